"""Our input pipeline beside a torch DataLoader: `python -m benchmarks.input`."""
