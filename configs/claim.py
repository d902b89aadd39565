"""The recipe that docs/claim.md found, on the demo's data set: as many queries as parts, and a small box weight.

docs/claim.md's figures are of an aviary of their own, which `python -m benchmarks.claim run` draws; its GRAIN arm is
this config (tests/test_recipes.py compares the two).

COMMAND   python -m grain_jax.train --config configs/claim.py --workdir runs/claim
HARDWARE  two CPU cores
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.total_steps = 500
    c.optim.warmup_steps = 60
    # A query settles on a part where there are as many as parts; with fewer, its box lies between parts.
    c.model.decoder.queries = 8
    c.input.max_regions = 8
    # The box loss sets AdamW's scale: with weight 1 it drowns the captions.
    c.loss.box = 0.2
    c.input.synthetic_caption_rate = 0.25
    c.model.decoder.qkv_init_gain = 2.5  # sharper attention from the start
    c.model.image.position_period = 16.0  # waves that fit a grid of 8 x 8
    c.model.text.context_length = 128
    c.input.lanes = 1
    c.text.pack_group = 32
    c.text.pack_rows = 18
    return c
