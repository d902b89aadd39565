"""Generates the aviary data set: drawn birds of invented species, with annotations.

  python -m data.aviary --output DIR [--images N --seed S --size 64 --processes P ...]

With --records R, DIR/A.jsonl is also built into TFRecords in R (as `python -m data.build` does).
"""

import dataclasses
import os
import sys

from etils import epath
from grain_jax.data import arguments as arguments_lib
from grain_jax.data import example, staging
from grain_jax.data.aviary import generate
from grain_jax.data.aviary.annotations import Noise
from grain_jax.data.aviary.drawing import Pose
from grain_jax.data.aviary.generate import Settings

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
    "scale_from": (0.3, 2.0),
    "scale_to": (0.3, 2.0),
    "turn": (0.0, 90.0),
    "shift": (0.0, 0.5),
    "jitter": (0.0, 2.0),
}


def _add(parser, defaults):
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if isinstance(default, (int, float)):
            low, high = _RANGES.get(field.name, (0.0, 1.0))
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                default=default,
                metavar="X",
                type=arguments_lib.number(type(default), low, high),
                help=f"{_HELP[field.name]} (default: {default})",
            )


def _parse(argv):
    parser = arguments_lib.Parser(
        "python -m data.aviary",
        description=__doc__,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--records", metavar="DIR", help="also build TFRecords here")
    parser.add_argument("--name", default="aviary", help="their name (default: aviary)")
    parser.add_argument(
        "--processes",
        type=arguments_lib.number(int, 1, 1024),
        metavar="P",
        default=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        help="default: one a core",
    )
    _add(parser.add_argument_group("what is made"), Settings())
    _add(parser.add_argument_group("poses"), Pose())
    _add(parser.add_argument_group("annotations"), Noise())
    arguments = parser.parse_args(argv)
    for low, high in (("least_parts", "most_parts"), ("scale_from", "scale_to")):
        if getattr(arguments, low) > getattr(arguments, high):
            parser.error(
                f"argument --{low.replace('_', '-')}: got {getattr(arguments, low)}, "
                f"expected at most --{high.replace('_', '-')} {getattr(arguments, high)}"
            )
    if arguments.wrong_names + arguments.missing_names > 1:
        parser.error(
            "arguments --wrong-names and --missing-names: got a sum of "
            f"{arguments.wrong_names + arguments.missing_names}, expected at most 1"
        )
    return arguments


def _group(kind, arguments, **others):
    names = {field.name for field in dataclasses.fields(kind)} - set(others)
    return kind(**{name: getattr(arguments, name) for name in names}, **others)


def main(argv=None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parse(argv)
    settings = _group(
        Settings, arguments, pose=_group(Pose, arguments), noise=_group(Noise, arguments)
    )
    try:
        made = generate.write(arguments.output, settings, processes=arguments.processes)
    except (ValueError, OSError) as error:
        print(f"python -m data.aviary: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: " + ("written" if made else "already complete"), file=sys.stderr)
    if not arguments.records:
        return 0
    target = epath.Path(arguments.records) / arguments.name / example.VERSION
    staging.recover(target)
    if not made and target.exists():  # exists only after a complete build
        return 0
    from grain_jax.data import build  # its imports take seconds

    return build.main(
        [
            "--annotations",
            str(epath.Path(arguments.output) / "A.jsonl"),
            "--images",
            arguments.output,
            "--output",
            arguments.records,
            "--name",
            arguments.name,
            "--workers",
            str(arguments.processes),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
