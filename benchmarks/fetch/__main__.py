"""Real pictures out of Debian packages: a data set to train on, and a set to test on. Nothing is part of the checkout.

`python -m benchmarks.fetch fashion --output DIR` (package dataset-fashion-mnist, MIT: 70,000 photographs of clothes,
shoes and bags, 28 x 28 grey values, 10 classes) writes

  DIR/A.jsonl, images/                 training images of 8 classes with boxes and words of their parts
  DIR/seen/CLASS/*                     other images of these classes
  DIR/unseen/KIND/*, unseen.json       images of kinds that training never shows, and their descriptions
  DIR/test/A.jsonl, test/images/       images with boxes and words, no names; test/seen.jsonl and
                                       test/unseen.jsonl are its two halves (images below DIR/test)
  DIR/README.md, LICENSE, settings.json   settings.json is written last

which is what `python -m benchmarks.claim --data DIR` reads. `python -m benchmarks.fetch gcompris --output DIR` (package
gcompris-qt-data) writes class folders for `grain-jax evaluate zeroshot`; `gcompris` has the list. The packages are
unpacked by dpkg-deb. docs/howto/real_pictures.md says what the sets can show and what not.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

from benchmarks.fetch import fashion, gcompris
from grain_jax.core import errors


def _whole(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"got {text}, expected {low} to {high}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    """The flags of both commands."""
    out = argparse.ArgumentParser(
        "python -m benchmarks.fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = out.add_subparsers(dest="command", metavar="fashion|gcompris", required=True)
    about = {
        "fashion": (fashion.PACKAGE, "photographs of clothes, with boxes and words of their parts"),
        "gcompris": (gcompris.PACKAGE, "photographs and drawings of nameable things, to test on"),
    }
    for name, (package, said) in about.items():
        kind = kinds.add_parser(name, help=f"{said} ({package})")
        kind.add_argument("--output", required=True, metavar="DIR", help="folder to write")
        found = f"the package {package}; without it, apt-get downloads it"
        kind.add_argument("--deb", metavar="FILE", help=found)
    add = kinds.choices["fashion"].add_argument
    said = "that measure (default: one a core)"
    add("--processes", type=_whole(1, 1024), metavar="P", default=os.cpu_count(), help=said)
    for field in dataclasses.fields(fashion.Settings):
        add(
            "--" + field.name.replace("_", "-"),
            type=_whole(*field.metadata["bounds"]),
            metavar="N",
            default=field.default,
            help=f"{field.metadata['help']} (default: {field.default})",
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    given = vars(parser().parse_args(argv))
    command, output = given.pop("command"), given.pop("output")
    try:
        if command == "gcompris":
            done = gcompris.write(output, **given)
        else:
            files = {name: given.pop(name) for name in ("deb", "processes")}
            done = fashion.write(output, fashion.Settings(**given), **files)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        reason = f"{error.filename or output}: {error.strerror or error}"
        print(f"{reason}; make room, or give another --output", file=sys.stderr)
        return 2
    print(f"{output}: {done}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
