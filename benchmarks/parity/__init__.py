"""Our numbers beside those of the PyTorch reference: `python -m benchmarks.parity`."""
