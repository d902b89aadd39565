"""Sweeps, one file each: `sweep()` yields the keys that a run changes, as `launch.sweep` reads them."""
