"""Evaluations of a model (zero-shot, retrieval, grounding) and the arithmetic and prompts that they share."""
