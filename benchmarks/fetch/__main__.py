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
unpacked by dpkg-deb.
"""

import os
import sys
from collections.abc import Sequence

from benchmarks.fetch import fashion, gcompris
from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command
from grain_jax.core import errors


class Gcompris(Command, name="fetch gcompris"):
    """Photographs and drawings of nameable things, to test on.

    the files:
      --output DIR  folder to write
      --deb FILE    the package gcompris-qt-data; without it, apt-get downloads it
    """

    output: str
    deb: str | None = None

    def write(self) -> str:
        """Writes the files; returns what was done."""
        return gcompris.write(self.output, deb=self.deb)


class Fashion(Command, name="fetch fashion"):
    """Photographs of clothes, with boxes and words of their parts.

    the files:
      --output DIR   folder to write
      --deb FILE     the package dataset-fashion-mnist; without it, apt-get downloads it
      --processes P  that measure (default: one a core)
    """

    output: str
    deb: str | None = None
    processes: int = flag(os.cpu_count() or 1, high=1024)
    settings: fashion.Settings = fashion.Settings()

    def write(self) -> str:
        """Writes the files; returns what was done."""
        return fashion.write(self.output, self.settings, deb=self.deb, processes=self.processes)


class Fetch(Command, name="fetch", kinds={"fashion": Fashion, "gcompris": Gcompris}):
    """Makes a data set of the real pictures in a Debian package."""


for declared in (Fetch, Fashion, Gcompris):  # the command is no part of the package
    declared.prog = "python -m " + declared.prog.replace("grain-jax ", "benchmarks.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    output = ""
    try:
        given = Fetch.parse(argv)
        output = given.output
        print(f"{output}: {given.write()}", file=sys.stderr)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        reason = f"{error.filename or output}: {error.strerror or error}"
        print(f"{reason}; make room, or give another --output", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
