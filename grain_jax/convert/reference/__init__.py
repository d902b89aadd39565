"""Checkpoints of the PyTorch reference (`.pth.tar`) to our models and back."""
