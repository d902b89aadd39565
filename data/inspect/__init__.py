"""Inspects a dataset: numbers, problems and a sheet of images (docs/inspect.md)."""
