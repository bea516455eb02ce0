"""A small model, and adapters with random values, for those who have none at hand."""
