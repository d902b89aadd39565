"""Inspects a data set: statistics, problems and a contact sheet (docs/inspect.md)."""
