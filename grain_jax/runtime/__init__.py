"""What a long run needs around its steps: processes, checkpoints, metrics, locks and ways to end."""
