"""Checkpoints of the PyTorch reference (`.pth.tar`) to our models and back.

A file holds `backbone_state_dict` (both towers) and `state_dict` (the region decoder).
"""
