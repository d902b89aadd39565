"""Our numbers beside the PyTorch reference's: `python -m benchmarks.parity`."""
