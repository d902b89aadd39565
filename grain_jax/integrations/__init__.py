"""Adapters that let the evaluators of other projects use a checkpoint of this package."""
