"""The demo with self-distillation as a further loss term, on the aviary.

COMMAND   grain-jax train --config examples/self_distillation/config.py --workdir runs/self_distillation
          (in a checkout; draws the aviary first, into runs/aviary)
HARDWARE  two CPU cores
"""

from grain_jax.configs import demo


def get_config():
    """The demo for 500 steps, and the term."""
    c = demo.get_config()
    c.total_steps = 500
    term = "examples.self_distillation.term:SelfDistillation"
    c.loss.terms.distillation = {"term": term, "weight": 0.3}
    return c
