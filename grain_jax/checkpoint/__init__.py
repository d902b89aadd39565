"""Training checkpoints, finished models, and models by name."""
