"""`grain_jax.recipe.points` under its older name, for sweep files that import it from here."""

from grain_jax.recipe.points import *  # noqa: F403
