"""The flags of `grain-jax fetch KIND`."""

import dataclasses
import os
from typing import Any

from grain_jax.data.fetch.settings import Settings

from grain_jax.cli.parser import KindsParser, Parser
from grain_jax.cli.values import number

_HELP = {
    "seed": "which images are taken, and the words of captions",
    "images": "training images, the classes in turn; fewer where the package has fewer",
    "seen_per_class": "evaluation images of each training class",
    "unseen_per_kind": "evaluation images of each held-out kind",
    "test_images": "test images with boxes, half of training classes; no two have the same parts",
    "caption_parts": "parts that a synthetic caption tells, at most",
}
_RANGES = {"seed": (0, 2**63), "caption_parts": (1, 8)}


def parser() -> KindsParser:
    """The parser of `grain-jax fetch`."""
    return KindsParser(
        "grain-jax fetch",
        [_fashion(), _gcompris()],
        example="grain-jax fetch fashion --output runs/fashion",
    )


def _fashion() -> Parser:
    out = Parser(
        "grain-jax fetch fashion",
        "photographs of clothes (dataset-fashion-mnist), with boxes and words of their parts",
        more="The folder is one that python -m benchmarks.claim --data reads.",
        example="grain-jax fetch fashion --output runs/fashion --images 4000",
    )
    add = _files(out, "dataset-fashion-mnist")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add(
        "--processes",
        type=number(int, 1, 1024),
        metavar="P",
        default=cores or 1,
        help="that measure (default: one a core)",
    )
    add = out.add_argument_group("what is taken").add_argument
    for field in dataclasses.fields(Settings):
        low, high = _RANGES.get(field.name, (0, 10**6))
        add(
            "--" + field.name.replace("_", "-"),
            type=number(int, low, high),
            metavar="N",
            default=field.default,
            help=f"{_HELP[field.name]} (default: {field.default})",
        )
    return out


def _gcompris() -> Parser:
    out = Parser(
        "grain-jax fetch gcompris",
        "photographs and drawings of nameable things (gcompris-qt-data), to test on",
        more="Class folders for grain-jax evaluate zeroshot: animals, things, monuments, drawings.",
        example="grain-jax fetch gcompris --output runs/gcompris",
    )
    _files(out, "gcompris-qt-data")
    return out


def _files(out: Parser, package: str) -> Any:
    add = out.add_argument_group("files").add_argument
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--deb", metavar="FILE", help=f"the package {package}; without it, apt-get downloads it")
    return add
