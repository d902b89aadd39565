"""The GRAIN model in Flax Linen: `grain.GRAIN` joins two towers and the region decoder."""
