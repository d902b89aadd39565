"""The flags of `grain-jax export`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command
from grain_jax.config import DTYPES


class Export(Command, name="export"):
    """Writes a model as StableHLO, which runs without grain_jax.

    Every function takes any number of images or texts and runs on CPUs, CUDA and TPUs.
    Exit status: 0; 1 where the functions give other outputs than the model; 2 for wrong input.

    Example:
      grain-jax export --checkpoint runs/demo --output exported

    what is exported:
      --checkpoint DIR  workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output DIR      folder to write
      --dtype TYPE      of the activations: float32 or bfloat16
    """

    checkpoint: str
    output: str
    dtype: str = flag("float32", choices=DTYPES)
