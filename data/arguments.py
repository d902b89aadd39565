"""The flags of `grain-jax build`."""

import argparse
import dataclasses
import re

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import add_orientation, positive, share


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How an image is stored: `kind` "original", "png" or "jpeg" with `quality`; `size` 0 = as it is."""

    kind: str
    quality: int = 0
    size: int = 0

    @property
    def tfds_format(self) -> str | None:
        """What TFDS's Image feature is told; None where files of both kinds may stand together."""
        return None if self.kind == "original" else self.kind

    def __str__(self) -> str:
        return f"jpeg:{self.quality}" if self.kind == "jpeg" else self.kind


def _encoding(text: str) -> Encoding:
    kind, _, quality = text.partition(":")
    if text in ("original", "png"):
        return Encoding(kind)
    if kind == "jpeg" and quality.isdecimal() and 1 <= int(quality) <= 100:
        return Encoding(kind, quality=int(quality))
    raise argparse.ArgumentTypeError(f"got {text!r}, expected original, png or jpeg:Q, Q in 1..100")


def _name(text: str) -> str:
    if re.fullmatch(r"[a-z][a-z0-9_]*", text):
        return text
    raise argparse.ArgumentTypeError(
        f"got {text!r}, expected a TFDS name: lower-case letters, digits and _, a letter first"
    )


def build_parser() -> Parser:
    """The parser of `grain-jax build`."""
    out = Parser(
        "grain-jax build",
        more="""
First every line is checked and every image decoded: all faults are named, by file and line, before anything
is written. Then TFDS's writer makes DIR/NAME/1.0.0.""",
        example="grain-jax build --annotations A.jsonl --images images --output records --name mine",
    )
    group = out.add_argument_group("what is built")
    add = group.add_argument
    add("--annotations", required=True, metavar="A.jsonl", help="one JSON object a line")
    add("--images", required=True, metavar="DIR", help="folder that the lines' paths start from")
    add_orientation(group)
    add("--output", required=True, metavar="DIR", help="the set goes to DIR/NAME/1.0.0")
    add(
        "--name",
        required=True,
        type=_name,
        metavar="NAME",
        help="name of the set, for input.name and TFDS",
    )
    out.switch("--overwrite", help="replace an existing set of that name", to=group)
    add = out.add_argument_group("how images are stored").add_argument
    add(
        "--store-size",
        type=positive,
        metavar="S",
        help="resize images to S x S pixels once, here (default: as they are)",
    )
    add(
        "--encoding",
        type=_encoding,
        default="original",
        metavar="original|png|jpeg:Q",
        help="original keeps files that need no change; Q is JPEG's quality, 1 to 100",
    )
    add(
        "--num-shards",
        type=positive,
        metavar="N",
        help="files of the set (default: 64 MB each, a multiple of 16)",
    )
    add = out.add_argument_group("what is left out").add_argument
    add(
        "--max-faults",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="of the lines that may be faulty, 0 to 1; they are left out",
    )
    add(
        "--holdout",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of the images, 0 to 1, chosen by their hash: split validation beside train (default: 0)",
    )
    add(
        "--exclude-duplicates-of",
        nargs="+",
        default=[],
        metavar="SET_DIR",
        help="leave out images that these TFDS sets have, in whatever size or compression",
    )
    add = out.add_argument_group("speed").add_argument
    add(
        "--workers",
        type=positive,
        metavar="N",
        help="processes (default: one a core; none for small sets)",
    )
    return out
