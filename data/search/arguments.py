"""The flags of `grain-jax search`."""

import argparse

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import CHECKPOINT, positive


def parser() -> Parser:
    """The parser of `grain-jax search`."""
    out = Parser(
        "grain-jax search",
        more="""
DIR is a folder that grain-jax embed wrote. Every vector is compared. Each image is found once, with its best region;
the table has its box in pixels.""",
        example='grain-jax search embeddings --text "a long orange beak" --text "a spiky crest" --top 20 \\\n'
        "    --output found.html\n"
        "grain-jax search embeddings --image bird.jpg --box 12,30,80,64",
    )
    add = out.add_argument_group("the question").add_argument
    add("folder", metavar="DIR", help="of embeddings")
    add(
        "--text",
        metavar="TEXT",
        action="append",
        default=[],
        help="what is looked for; may be given several times",
    )
    add(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="images like this one; may be given several times",
    )
    add(
        "--box",
        metavar="X1,Y1,X2,Y2",
        type=_box,
        help="of one --image, in pixels: what is like it, or without a box head like the model's nearest region",
    )
    group = out.add_argument_group("what is searched")
    group.add_argument(
        "--by",
        choices=("regions", "images"),
        help="compare regions or whole images (default: regions for texts and boxes, images for images)",
    )
    group.add_argument("--top", metavar="K", type=positive, default=10, help="images a question")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help=f"{CHECKPOINT} (default: where it lay when the embeddings were made)",
    )
    out.switch("--faiss", to=group, help="search with FAISS, which holds all vectors in memory")
    add = out.add_argument_group("the page").add_argument
    add("--output", metavar="PAGE.html", help="page with the images and their regions, one file")
    add(
        "--images",
        metavar="DIR",
        help="where the images, the tars or the record set lie now (default: where they lay then)",
    )
    return out


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        x1 = y1 = x2 = y2 = 0.0
    if x1 < x2 and y1 < y2:
        return x1, y1, x2, y2
    raise argparse.ArgumentTypeError(f"got {text!r}, expected X1,Y1,X2,Y2 with X1 < X2 and Y1 < Y2")
