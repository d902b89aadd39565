"""Embeddings of many images and their regions: `grain-jax embed`."""
