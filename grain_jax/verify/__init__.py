"""Checks that a run is what its receipt says (docs/receipt.md): `grain-jax verify WORKDIR`."""
