"""The files that `to-hf` copies into its folder: plain PyTorch and transformers, no JAX, no grain_jax."""
