"""ml_collections configs, one file a recipe. What they share is `grain_jax.recipe`; none imports JAX."""
