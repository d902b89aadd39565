"""The flags of `grain-jax inspect`."""

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import add_orientation, number

_MOST_IMAGES = 200  # the PNG is then about 25,000 pixels high


def parser() -> Parser:
    """The parser of `grain-jax inspect`."""
    out = Parser(
        "grain-jax inspect",
        more="""
The set is read once. Memory does not grow with it: beyond 250,000 different texts or images, copies are
estimated from a share of them.""",
        example="grain-jax inspect records/mine\ngrain-jax inspect A.jsonl --images images",
    )
    group = out.add_argument_group("what is inspected")
    add = group.add_argument
    add(
        "set",
        metavar="SET",
        help="record set, DIR/NAME or DIR/NAME/1.0.0 of grain-jax build, or an A.jsonl",
    )
    add(
        "--images",
        metavar="DIR",
        help="folder that the paths of an A.jsonl start from (default: the folder of the file)",
    )
    add_orientation(group)
    add("--output", metavar="DIR", help="folder to write (default: inspect beside the set)")
    add = out.add_argument_group("how").add_argument
    add(
        "--num-images",
        type=number(int, 0, _MOST_IMAGES),
        default=24,
        metavar="N",
        help=f"images on the contact sheet, at most {_MOST_IMAGES}",
    )
    add(
        "--lanes",
        type=number(int, 1, 10**6),
        default=16,
        metavar="N",
        help="input.lanes of the training; shards are checked for it",
    )
    out.older(pictures="--num-images", records="", annotations="")
    return out
