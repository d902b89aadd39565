"""The data of the comparison: an aviary or your folder, divided into classes for validation and the test.

    python -m examples.claim.data --output runs/claim/data [--poses | --source DIR]

DIR has these files:

    A.jsonl                           training annotations (data/SCHEMA.md), images below DIR
    seen/CLASS/*, unseen/CLASS/*      images of classes that captions name, and of held-out classes
    unseen.json                       {"class": ["description", ...]} of the held-out classes
    test/A.jsonl, test/unseen.jsonl   annotations below DIR/test, for retrieval and for grounding
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from grain_jax.core import errors
from grain_jax.data import build
from grain_jax.data.aviary import __main__ as aviary
from grain_jax.input_pipeline import record_folders

PARTS = ("A.jsonl", "seen", "unseen", "unseen.json", "test/A.jsonl", "test/unseen.jsonl")
NAME = "claim"  # of the record set
# Easier poses, and the demo's.
AVIARY: Mapping[str, str] = dict(
    pair.split("=")
    for pair in "seed=23 images=16000 test_images=400 seen_per_species=10 unseen_per_species=15"
    " held_out_genera=20 scale_from=0.95 turn=3 shift=0.02 least_parts=8 most_parts=8 caption_parts=4"
    " wrong_descriptions=0.05 wrong_names=0.03 missing_names=0.02 caption_errors=0.05".split()
)
POSES: Mapping[str, Any] = dict(scale_from=0.8, turn=6.0, shift=0.04, mirrored=0.5)


def draw(folder: pathlib.Path, options: Mapping[str, Any]) -> None:
    """Draws an aviary with these options of `grain-jax aviary`, unless it is there."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    if aviary.main([f"--output={folder}", *flags]):
        raise errors.UserError(f"{folder}: could not be drawn")


def prepare(source: pathlib.Path, output: pathlib.Path) -> None:
    """Builds the records of the folder `source` and divides its classes; does again only what is missing.

    Raises:
      UserError: a part of the folder is missing, or its annotations have faults.
    """
    missing = [part for part in PARTS if not (source / part).exists()]
    if missing:
        raise errors.UserError(f"--source: {source} has no {', '.join(missing)}; --help says what it needs")
    records = output / "records"
    if not (records / NAME / record_folders.VERSION).exists():  # moved there when it is complete
        flags = [f"--annotations={source / 'A.jsonl'}", f"--images={source}"]
        if build.main([*flags, f"--output={records}", f"--name={NAME}"]):
            raise errors.UserError(f"{source}: its records could not be built")
    divide(source, output)


def divide(source: pathlib.Path, output: pathlib.Path) -> None:
    """Links images of seen classes, in turns, and held-out ones, by halves, into folders for each split."""
    described = json.loads((source / "unseen.json").read_text())
    names = list(described)  # the order of the file keeps related classes together
    halves = {"validation": names[: len(names) // 2], "test": names[len(names) // 2 :]}
    for split, classes in halves.items():
        for name in classes:
            link(source / "unseen" / name, output / f"unseen_{split}" / name)
    for folder in sorted((source / "seen").iterdir()):
        for number, image in enumerate(sorted(folder.iterdir())):
            split = ("validation", "test")[number % 2]
            link(image, output / f"seen_{split}" / folder.name / image.name)
    link(source / "test", output / "test")
    sentences = {name: [", ".join(descriptions)] for name, descriptions in described.items()}
    for file, content in (("unseen.json", described), ("sentences.json", sentences)):
        (output / file).write_text(json.dumps(content, indent=1) + "\n")


def link(target: pathlib.Path, path: pathlib.Path) -> None:
    """Makes a symbolic link, and the folders above it, unless there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def main() -> int:
    """Parses the command line; returns the exit status."""
    raw, name = argparse.RawDescriptionHelpFormatter, "python -m examples.claim.data"
    parser = argparse.ArgumentParser(name, None, __doc__, formatter_class=raw)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--source", type=pathlib.Path, metavar="DIR", help="your own data")
    which.add_argument("--poses", action="store_true", help="draw harder poses")
    args = parser.parse_args()
    try:
        if not (source := args.source):
            draw(source := args.output / "aviary", {**AVIARY, **(POSES if args.poses else {})})
        prepare(source, args.output)
    except errors.UserError as error:
        print(f"examples.claim.data: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
