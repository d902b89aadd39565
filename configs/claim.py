"""The arm that won in docs/claim.md: configs/demo.py for fewer steps, with a longer context for captions and no box head.

The figures of docs/claim.md are of another aviary, which `python -m benchmarks.claim run` draws; its last arm is this
config (tests/test_recipes.py compares the two).

COMMAND   grain-jax train --config claim --workdir runs/claim
HARDWARE  two CPU cores
"""

from grain_jax.configs import demo


def get_config():
    c = demo.get_config()
    c.total_steps = 500
    c.optim.warmup_steps = 60
    c.input.max_regions = 8
    c.model.boxes.kind = "none"
    c.loss.box_description = 0.0
    c.model.text.context_length = 128
    c.input.lanes = 1
    c.text.pack_group = 32
    return c
