"""What a long run needs around its steps: processes, checkpoints, metrics, receipts, locks and ways to end."""
