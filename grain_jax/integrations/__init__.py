"""Adapters: a checkpoint as a model of another project, for its evaluators."""
