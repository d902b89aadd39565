"""Offline production of training records: build, annotate, inspect and the embedded dataset."""
