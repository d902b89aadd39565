"""One training step: optimiser, sharding, and what the step costs in FLOPs and memory."""
