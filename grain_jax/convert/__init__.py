"""Checkpoints between frameworks: `python -m grain_jax.convert`; torch is imported where it is used."""
