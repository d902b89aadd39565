"""Answers texts and images over a folder of embeddings (docs/embed.md)."""
