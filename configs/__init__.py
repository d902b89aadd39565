"""ml_collections configs, one file a recipe. They share `grain_jax.config.recipe`; none imports JAX."""
