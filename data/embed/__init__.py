"""Embeddings of the images of a source, as Parquet files (docs/embed.md)."""
