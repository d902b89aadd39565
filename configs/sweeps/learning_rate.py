"""Three learning rates with two seeds each: what the schedule's peak does, and how far seeds alone spread.

COMMAND   grain-jax sweep --config demo --sweep learning_rate --workdir runs/rates
HARDWARE  two CPU cores: --parallel 2
"""

from grain_jax.config.points import grid, seeds


def sweep():
    """6 runs."""
    yield from seeds(2, grid({"optim.learning_rate": (5e-4, 1e-3, 2e-3)}))
