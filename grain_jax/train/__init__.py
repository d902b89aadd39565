"""The run from top to bottom (run.py), and its step: optimiser, sharding, cost in FLOPs and memory."""
