"""Checkpoints between frameworks: `grain-jax convert`; torch is imported where it is used."""
