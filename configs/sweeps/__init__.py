"""Sweeps, one file each: `sweep()` yields the keys that a run changes, as `grain-jax sweep` reads them."""
