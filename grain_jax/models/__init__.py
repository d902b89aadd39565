"""The GRAIN model in Flax Linen: `grain.GRAIN` joins the image tower, the text tower and the region decoder."""
