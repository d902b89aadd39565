"""The recipe that won in docs/claim.md, on the demo's data set: words in the global embedding, and all regions.

It is configs/demo.py for fewer steps with two captions an image, L_id and the sum of all queries as the image
embedding. The figures of docs/claim.md are of another aviary, which `python -m benchmarks.claim run` draws; its last arm
is this config (tests/test_recipes.py compares the two).

COMMAND   grain-jax train --config claim --workdir runs/claim
HARDWARE  two CPU cores
"""

from grain_jax.configs import demo


def get_config():
    c = demo.get_config()
    c.total_steps = 500
    c.optim.warmup_steps = 60
    c.input.max_regions = 8
    c.input.captions_per_image = 2
    c.loss.image_description = 1.0
    c.model.decoder.image_pool = "all"
    c.model.text.context_length = 128
    c.input.lanes = 1
    c.text.pack_group = 32
    return c
