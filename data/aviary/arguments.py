"""The flags of `grain-jax aviary`."""

import argparse
import dataclasses
import os
from typing import Any

from grain_jax.data.aviary.settings import TEST_NEGATIVES, Noise, Pose, Settings

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import number

_HELP = {
    "seed": "everything drawn and written follows from it",
    "size": "side of the images in pixels; PNG up to 128, JPEG above",
    "images": "training images",
    "seen_per_species": "evaluation images of each training species",
    "unseen_per_species": "evaluation images of each held-out species",
    "test_images": "test images with exact boxes, seen and unseen species in turn",
    "genera": "genera of training species",
    "species_per_genus": "training species in each",
    "held_out_genera": "genera of held-out species",
    "held_out_species_per_genus": "held-out species in each",
    "parts_changed": "parts of 8 in which a species departs from its genus (8: independent)",
    "least_parts": "annotated parts of an image, at least",
    "most_parts": "annotated parts of an image, at most",
    "caption_parts": "parts that a synthetic caption tells",
    "negatives": "wrong descriptions of each region of a training image, near misses; test images have 10",
    "scale_from": "smallest bird",
    "scale_to": "largest bird",
    "turn": "birds lean up to so many degrees either way",
    "shift": "birds stand off the middle by up to this share of the image",
    "mirrored": "share of birds that look the other way",
    "colour_variation": "colours vary by up to this share",
    "misses": "noise: share of parts that the detector misses",
    "jitter": "noise: box edges move by this share of the box's side (standard deviation)",
    "wrong_descriptions": "noise: share of regions with a wrong description",
    "paraphrased": "share of descriptions in other words",
    "score_noise": "noise: standard deviation of scores",
    "wrong_names": "noise: share of web captions with another species' name",
    "missing_names": "noise: share of web captions without a name",
    "caption_errors": "noise: share of wrong parts in synthetic captions",
    "synthetic_paraphrased": "share of parts in other words in synthetic captions",
}
# Inclusive ranges of the options that are not in [0, 1].
_RANGES = {
    "seed": (0, 2**63),
    "size": (32, 4096),
    "images": (0, 10**8),
    "seen_per_species": (0, 10**4),
    "unseen_per_species": (0, 10**4),
    "test_images": (0, 10**6),
    "genera": (1, 10**3),
    "species_per_genus": (1, 10**3),
    "held_out_genera": (0, 10**3),
    "held_out_species_per_genus": (0, 10**3),
    "parts_changed": (1, 8),
    "least_parts": (0, 8),
    "most_parts": (1, 8),
    "caption_parts": (1, 8),
    "negatives": (0, TEST_NEGATIVES),
    "scale_from": (0.3, 2.0),
    "scale_to": (0.3, 2.0),
    "turn": (0.0, 90.0),
    "shift": (0.0, 0.5),
    "jitter": (0.0, 2.0),
}


def parser() -> Parser:
    """The parser of `grain-jax aviary`."""
    out = _AviaryParser(
        "grain-jax aviary",
        more="With --records DIR, A.jsonl is also built into TFRecords there, as grain-jax build does.",
        example="grain-jax aviary --output runs/aviary --records runs/aviary/records",
    )
    add = out.add_argument_group("files").add_argument
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--records", metavar="DIR", help="also build TFRecords in DIR/NAME/1.0.0")
    add("--name", default="aviary", metavar="NAME", help="of the record set")
    add(
        "--processes",
        type=number(int, 1, 1024),
        metavar="P",
        default=_cores(),
        help="that draw (default: one a core)",
    )
    _add(out.add_argument_group("what is drawn"), Settings())
    _add(out.add_argument_group("poses"), Pose())
    _add(out.add_argument_group("annotations"), Noise())
    return out


class _AviaryParser(Parser):
    """Checks options against each other, too."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """The arguments. Raises UserError."""
        found = super().parse_args(args, namespace)
        for low, high in (("least_parts", "most_parts"), ("scale_from", "scale_to")):
            if getattr(found, low) > getattr(found, high):
                self.error(
                    f"--{low.replace('_', '-')}: got {getattr(found, low)}, "
                    f"expected at most --{high.replace('_', '-')} {getattr(found, high)}"
                )
        if found.wrong_names + found.missing_names > 1:
            self.error(
                "--wrong-names and --missing-names: got a sum of "
                f"{found.wrong_names + found.missing_names}, expected at most 1"
            )
        return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _add(group: Any, defaults: Any) -> None:
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if isinstance(default, (int, float)):
            low, high = _RANGES.get(field.name, (0.0, 1.0))
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                default=default,
                metavar="N" if isinstance(default, int) else "X",
                type=number(type(default), low, high),
                help=f"{_HELP[field.name]} (default: {default})",
            )
