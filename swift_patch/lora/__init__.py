"""LoRAs as tensors, without a model: what to merge, and how."""
