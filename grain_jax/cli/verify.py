"""The flags of `grain-jax verify`."""

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import positive, whole


def parser() -> Parser:
    """The parser of `grain-jax verify`."""
    out = Parser(
        "grain-jax verify",
        more="""
Checks that the records of the saves form one unbroken chain, and that checkpoints, metrics and config are
the recorded ones. Then trains K steps again, from a checkpoint (or from the seed: --from 0), on the data of
the run: batches must be equal on any number of devices, parameters bit for bit where mesh and versions are
the recorded ones, and losses within a tolerance elsewhere.
Exit status: 0: proved; 1: it is not; 2: it cannot be checked.""",
        example="grain-jax verify runs/demo --steps 5",
    )
    add = out.add_argument_group("what is checked").add_argument
    add("workdir", metavar="WORKDIR", help="of a run")
    add(
        "--from",
        dest="start",
        type=whole,
        metavar="STEP",
        help="step of a kept checkpoint to train again from, or 0 (default: the oldest kept one)",
    )
    add(
        "--steps",
        type=positive,
        metavar="K",
        help="steps to train again (default: up to the next kept checkpoint)",
    )
    out.older(workdir="")
    return out
