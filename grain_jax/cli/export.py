"""The flags of `grain-jax export`."""

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import CHECKPOINT
from grain_jax.config import DTYPES


def parser() -> Parser:
    """The parser of `grain-jax export`."""
    out = Parser(
        "grain-jax export",
        more="Every function takes any number of images or texts and runs on CPUs, CUDA and TPUs.\n"
        "Exit status: 0; 1 where the functions give other outputs than the model; 2 for wrong input.",
        example="grain-jax export --checkpoint runs/demo --output exported",
    )
    add = out.add_argument_group("what is exported").add_argument
    add("--checkpoint", metavar="DIR", required=True, help=CHECKPOINT)
    add("--output", metavar="DIR", required=True, help="folder to write")
    add("--dtype", choices=DTYPES, default="float32", help="of the activations")
    return out
