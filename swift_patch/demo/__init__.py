"""The demo: a town whose houses renumber everything once a year, a base model of last year, and a LoRA per house."""
