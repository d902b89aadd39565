"""Inspects a data set: numbers, problems and a sheet of images (docs/inspect.md)."""
