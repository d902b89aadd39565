"""ml_collections configs, one file a recipe. They import neither JAX nor grain_jax."""
