"""LoRAs in a torch model: where they are, what a new one would be, and how a fused one is filled and activated."""
