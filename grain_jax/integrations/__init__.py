"""Adapters to the evaluators of other projects."""
