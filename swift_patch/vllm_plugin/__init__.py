"""Every request of vLLM's continuous batches with its own fusion of LoRAs. Only where vLLM is installed."""
