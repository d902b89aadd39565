"""The data of the comparison: an aviary or your folder, divided into classes for validation and the test.

    python -m examples.claim.data --output runs/claim/data [--source DIR]

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

from grain_jax.data import build
from grain_jax.data.aviary import __main__ as aviary
from grain_jax.input_pipeline import record_folders

PARTS = ("A.jsonl", "seen", "unseen", "unseen.json", "test/A.jsonl", "test/unseen.jsonl")
NAME = "claim"  # of the record set
BIRDS = (  # flags of `grain-jax aviary`
    "--seed=23 --images=16000 --test-images=400 --seen-per-species=10 --unseen-per-species=15"
    " --held-out-genera=20 --scale-from=0.95 --turn=3 --shift=0.02 --least-parts=8 --most-parts=8"
    " --caption-parts=4 --wrong-descriptions=0.05 --wrong-names=0.03 --missing-names=0.02"
    " --caption-errors=0.05"
).split()


def divide(source: pathlib.Path, output: pathlib.Path) -> None:
    """Links images of seen classes, in turns, and held-out ones, by halves, into folders for each split."""
    described = json.loads((source / "unseen.json").read_text())
    for number, name in enumerate(described):  # the order of the file keeps related classes together
        split = "validation" if number < len(described) // 2 else "test"
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
    """Makes what is missing; returns the exit status."""
    raw, name = argparse.RawDescriptionHelpFormatter, "python -m examples.claim.data"
    parser = argparse.ArgumentParser(name, None, __doc__, formatter_class=raw)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--source", type=pathlib.Path, metavar="DIR", help="your own data")
    args = parser.parse_args()
    source, records = args.source or args.output / "aviary", args.output / "records"
    if not args.source and aviary.main([f"--output={source}", *BIRDS]):
        return 2
    if missing := [part for part in PARTS if not (source / part).exists()]:
        print(f"--source: {source} has no {', '.join(missing)}; --help says what it needs", file=sys.stderr)
        return 2
    if not (records / NAME / record_folders.VERSION).exists():  # moved there when it is complete
        flags = [f"--annotations={source / 'A.jsonl'}", f"--images={source}"]
        if build.main([*flags, f"--output={records}", f"--name={NAME}"]):
            return 2
    divide(source, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
