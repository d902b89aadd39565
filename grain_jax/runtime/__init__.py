"""What a long run needs around its steps: processes, checkpoints, locks and ways to end."""
