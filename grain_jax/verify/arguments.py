"""The flags of `grain-jax verify`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command


class Verify(Command, name="verify"):
    """Checks that a run is what its receipt says.

    Checks that the records of the saves form one unbroken chain, and that checkpoints, metrics and config are
    the recorded ones. Then trains K steps again, from a checkpoint (or from the seed: --from 0), on the data of
    the run: batches must be equal on any number of devices, parameters bit for bit where mesh and versions are
    the recorded ones, and losses within a tolerance elsewhere.
    Exit status: 0: proved; 1: it is not; 2: it cannot be checked.

    Example:
      grain-jax verify runs/demo --steps 5

    what is checked:
      WORKDIR      of a run
      --from STEP  step of a kept checkpoint to train again from, or 0 (default: the oldest kept one)
      --steps K    steps to train again (default: up to the next kept checkpoint)
    """

    workdir: str
    start: int | None = flag(None, name="from", low=0)
    steps: int | None = None
