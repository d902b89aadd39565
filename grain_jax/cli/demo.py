"""The flags of `grain-jax demo`."""

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import CHECKPOINT, number


def parser() -> Parser:
    """The parser of `grain-jax demo`."""
    out = Parser(
        "grain-jax demo",
        example="grain-jax demo --checkpoint runs/demo",
    )
    add = out.add_argument_group("the model and what it sees").add_argument
    add("--checkpoint", metavar="DIR", required=True, help=CHECKPOINT)
    add(
        "--classes",
        metavar="FILE",
        help='{"class name": ["description", ...]} as JSON, or one class a line; the page can edit them (default:'
        " those of the run's evaluations, where they have descriptions)",
    )
    add(
        "--examples",
        metavar="DIR",
        help="folder of images, or of folders of them (default: a few that are drawn)",
    )
    add = out.add_argument_group("the server").add_argument
    add(
        "--port",
        metavar="N",
        type=number(int, 1, 65535),
        help="(default: the first free one from 7860)",
    )
    add(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="0.0.0.0: others can use it, without a login",
    )
    return out
