"""Checks that a run is what its receipt says (docs/receipt.md): `grain-jax verify WORKDIR`."""

from grain_jax.verify.command import main, verify
from grain_jax.verify.workdir import Mismatch

__all__ = ["Mismatch", "main", "verify"]
