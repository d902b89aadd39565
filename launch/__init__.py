"""Starting runs. Thin: every launcher ends in `python -m grain_jax.train`."""
