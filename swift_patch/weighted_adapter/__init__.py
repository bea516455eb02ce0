"""Fused LoRA adapters: made, refilled in place and activated, at the cost of what changes."""
