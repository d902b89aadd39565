"""ml_collections configs, one file a recipe. What they share is `grain_jax.config.recipe`; none imports JAX."""
