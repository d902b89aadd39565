"""`grain_jax.recipe` under its older name, for config files that import it from here."""

from grain_jax.recipe import *  # noqa: F403
