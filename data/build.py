"""Annotations and images -> a TFDS-format record set (format: data/SCHEMA.md).

  python -m data.build --annotations A.jsonl --images DIR --output DIR --name NAME

First every line is checked and every image decoded: all faults are named, by file and line, before
anything is written. Then TFDS's writer makes OUTPUT/NAME/1.0.0.
"""

import argparse
import array
import collections
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from data import duplicates, example, parallel, progress, staging
from grain_jax import errors, printable

SHARD_BYTES = 64 << 20  # aimed at: a block of a lane, one shard by default, is held in memory whole
SHARD_MULTIPLE = 16  # so that 16 lanes (the default), or 2, 4, 8, get equal shares
INLINE_LINES = 1000  # below this, starting processes takes longer than the work

ReadLines = Callable[[epath.Path], Iterable[example.Line]]


class BuildError(errors.UserError):
    """The set cannot be built from this input; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line and status 2."""

    def error(self, message: str):
        """Called by argparse."""
        self.exit(2, f"{self.prog}: {message}; --help lists the arguments\n")


def _encoding(text: str) -> example.Encoding:
    kind, _, quality = text.partition(":")
    if text in ("original", "png"):
        return example.Encoding(kind)
    if kind == "jpeg" and quality.isdecimal() and 1 <= int(quality) <= 100:
        return example.Encoding(kind, quality=int(quality))
    raise argparse.ArgumentTypeError(f"got {text!r}, expected original, png or jpeg:Q, Q in 1..100")


def _name(text: str) -> str:
    if re.fullmatch(r"[a-z][a-z0-9_]*", text):
        return text
    raise argparse.ArgumentTypeError(
        f"got {text!r}, expected a TFDS name: lower-case letters, digits and _, a letter first"
    )


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")


def share(text: str) -> float:
    """An argument that is a share, from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a share from 0 to 1")


def parser() -> Parser:
    """The command's arguments."""
    out = Parser(prog="python -m data.build", description=__doc__.splitlines()[0])
    add = out.add_argument
    add("--annotations", required=True, metavar="A.jsonl", help="one JSON object a line")
    add("--images", required=True, metavar="DIR", help="folder that the lines' paths start from")
    add("--output", required=True, metavar="DIR", help="the set goes to DIR/NAME/1.0.0")
    add("--name", required=True, type=_name, help="name of the set, for input.name and TFDS")
    add("--num-shards", type=positive, help="default: 64 MB each, a multiple of 16")
    add("--store-size", type=positive, metavar="S", help="resize images to S x S once, here")
    add(
        "--encoding",
        type=_encoding,
        default="original",
        metavar="original|png|jpeg:Q",
        help="how images are stored; original keeps files that need no change (default)",
    )
    add("--max-faults", type=share, default=0.01, metavar="F", help="share of lines (default 0.01)")
    add("--overwrite", action="store_true", help="replace an existing set of that name")
    add(
        "--holdout",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of the images, chosen by their hash: split validation beside train (default 0)",
    )
    add(
        "--exclude-duplicates-of",
        nargs="+",
        default=[],
        metavar="SET_DIR",
        help="leave out images that these TFDS sets have, in whatever size or compression",
    )
    add("--workers", type=positive, help="processes (default: one a core; none for small sets)")
    return out


class Survey:
    """What the first pass found: which lines are good, and what is wrong with the others."""

    def __init__(self, file_name: str):
        self.file_name = file_name
        self.ids: dict[int, str] = {}  # line -> id, of the good lines
        self.faults: list[tuple[int, str]] = []  # (line, what)
        self.lines = self.picture_bytes = self.boxes_clipped = 0
        self.regions = array.array("I")  # of each good line
        self.unknown_keys: collections.Counter[str] = collections.Counter()
        self.fingerprints = array.array("Q")  # exact and near, of the good lines in order
        self._line_of_id: dict[str, int] = {}

    @property
    def faulty_lines(self) -> int:
        """Lines with at least one fault."""
        return self.lines - len(self.ids)

    def add(self, verdict: example.Verdict) -> None:
        """Counts a line; its faults go to stderr at once."""
        self.lines += 1
        self.unknown_keys.update(verdict.unknown_keys)
        faults = list(verdict.faults)
        if not faults:
            identity = verdict.id
            if identity is None:  # its image's path, unless another line has that image too
                identity = verdict.image
                if identity in self._line_of_id:
                    identity = f"{verdict.image}#{verdict.number}"
            if identity in self._line_of_id:
                faults = [
                    f"id: got {json.dumps(identity)}, which line {self._line_of_id[identity]} has"
                    " already, expected one of its own"
                ]
        for fault in faults:
            self.faults.append((verdict.number, fault))
            line = printable.plain(f"{self.file_name}:{verdict.number}: {fault}")
            print(line, file=sys.stderr)
        if faults:
            return
        self.ids[verdict.number] = identity
        self.fingerprints.extend(verdict.fingerprint)
        self._line_of_id[identity] = verdict.number
        self.picture_bytes += verdict.picture_bytes
        self.regions.append(verdict.regions)
        self.boxes_clipped += verdict.boxes_clipped

    def summary(self) -> str:
        """One line about all that was left out or changed."""
        parts = [f"{self.faulty_lines} of {self.lines} lines faulty ({len(self.faults)} faults)"]
        if self.boxes_clipped:
            parts.append(
                f"{self.boxes_clipped} of {sum(self.regions)} boxes clipped to their image"
            )
        if self.unknown_keys:
            named = ", ".join(
                f"{printable.plain(key, 60)} ({n})" for key, n in self.unknown_keys.most_common()
            )
            parts.append(f"unknown keys kept out: {named}")
        return f"{self.file_name}: " + "; ".join(parts)

    def write_faults(self, path: epath.Path) -> None:
        """One JSON object a fault: file, line, fault."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                json.dumps({"file": self.file_name, "line": line, "fault": fault}) + "\n"
                for line, fault in self.faults
            )
        )


def survey(
    annotations: epath.Path,
    folder: epath.Path,
    *,
    workers: int,
    total: int,
    read_lines: ReadLines = example.read_lines,
) -> Survey:
    """Checks all lines and decodes all images."""
    found = Survey(str(annotations))
    check = functools.partial(example.check, folder=str(folder))
    verdicts = parallel.ordered_map(check, read_lines(annotations), workers=workers)
    for verdict in progress.progress(verdicts, total=total, what="checking"):
        found.add(verdict)
    return found


class Division(NamedTuple):
    """Which good lines go where."""

    train: dict[int, str]  # line -> id
    validation: dict[int, str]
    fingerprints: np.ndarray  # uint64 [N, 2] of both
    regions: int  # of both
    duplicates: list[dict]  # a line of duplicates.jsonl each
    left_out: int


def divide(found: Survey, args: argparse.Namespace, workers: int) -> Division:
    """Leaves out what other sets have, and holds out a share.

    An image's side depends on its file only, so it is the same in each run and in each set; but one that
    is nearly a held-out one is held out too.

    Raises:
      BuildError: nothing is left for one of the splits.
      data.sources.SourceError: one of the other sets is not there.
    """
    lines, ids = list(found.ids), list(found.ids.values())
    prints = duplicates.table(found.fingerprints)
    kept, listed = np.ones(len(lines), bool), []

    def note(index: int, kind: str, of: str, left_out: bool) -> None:
        line = {"file": found.file_name, "line": lines[index], "id": ids[index]}
        listed.append(line | {"kind": kind, "of": of, "left_out": left_out})

    for other in args.exclude_duplicates_of:
        known = duplicates.of_set(other, workers=workers)
        exact, near = duplicates.matches(prints, known)
        for index in np.nonzero(near & kept)[0]:
            note(index, "exact" if exact[index] else "near", str(other), True)
        kept &= ~near
    twins = duplicates.earlier_twins(prints)
    for index in np.nonzero((twins >= 0) & kept)[0]:
        note(index, "exact", f"line {lines[twins[index]]}", False)

    aside = kept & (prints[:, 0] < args.holdout * 2.0**64)
    while (more := duplicates.matches(prints, prints[aside])[1] & kept & ~aside).any():
        aside |= more
    splits = [
        {lines[index]: ids[index] for index in np.nonzero(chosen)[0]}
        for chosen in (kept & ~aside, aside)
    ]
    if not splits[0] or (args.holdout and not splits[1]):
        raise BuildError(
            f"--holdout {args.holdout:g}, {len(args.exclude_duplicates_of)} sets excluded: of"
            f" {len(lines)} images {len(splits[0])} are left for train and {len(splits[1])} for"
            " validation, expected at least one; no records were written"
        )
    regions = int(np.asarray(found.regions)[kept].sum())
    return Division(*splits, prints[kept], regions, listed, int((~kept).sum()))


def examples(
    ids: dict[int, str],
    annotations: epath.Path,
    folder: epath.Path,
    encoding: example.Encoding,
    workers: int,
    rescued: list[int],
    read_lines: ReadLines = example.read_lines,
) -> Iterator[dict]:
    """The lines of `ids` as examples. Raises BuildError where the input changed since it was checked.

    Args:
      rescued: gets the numbers of the lines whose files are stored anew, since training cannot read them.
    """
    lines = (line for line in read_lines(annotations) if line.number in ids)
    encode = functools.partial(example.encode, folder=str(folder), encoding=encoding)
    encoded = parallel.ordered_map(encode, lines, workers=workers)
    good = progress.progress(encoded, total=len(ids), what="writing")
    for (number, identity), item in zip(ids.items(), good, strict=True):
        if isinstance(item, list):
            raise BuildError(f"{annotations}:{number}: {item[0]} (it was right when checked)")
        if item.rescued:
            rescued.append(number)
        yield item.features | {"id": identity}


def default_num_shards(num_examples: int, num_bytes: int) -> int:
    """64 MB a shard, in multiples of 16; few examples make at most one shard each."""
    wanted = max(1, -(-num_bytes // (SHARD_BYTES * SHARD_MULTIPLE))) * SHARD_MULTIPLE
    return min(wanted, num_examples)


def _stored_bytes(found: Survey, encoding: example.Encoding) -> int:
    """A guess at the set's size: the files', or 3 bytes a pixel shrunk as photographs do."""
    if not encoding.size:
        return found.picture_bytes
    bytes_per_pixel = 0.4 if encoding.kind == "jpeg" else 1.8
    return int(len(found.ids) * encoding.size**2 * bytes_per_pixel)


def build(args: argparse.Namespace, read_lines: ReadLines = example.read_lines) -> str:
    """Builds the set; returns a line about it.

    Args:
      args: as `parser` gives them.
      read_lines: gives the lines of `args.annotations`, with their images where these are no files.

    Raises:
      BuildError: wrong usage or wrong input.
      staging.BusyError: another process builds the same set.
      OSError: the output cannot be written.
    """
    start = time.monotonic()
    annotations, folder = epath.Path(args.annotations), epath.Path(args.images)
    target = epath.Path(args.output) / args.name / example.VERSION
    if annotations.is_dir() or not annotations.exists():
        raise BuildError(
            f"--annotations {annotations}: no such file, expected one JSON object a line"
        )
    if not folder.is_dir():
        raise BuildError(f"--images {folder}: no such folder, expected the images")
    with staging.locked(target):
        return _build(args, annotations, folder, target, read_lines, start)


def _build(
    args: argparse.Namespace,
    annotations: epath.Path,
    folder: epath.Path,
    target: epath.Path,
    read_lines: ReadLines,
    start: float,
) -> str:
    """`build` with its lock."""
    staging.recover(target)
    if target.exists() and not args.overwrite:
        raise BuildError(f"{target}: a set is there already; --overwrite replaces it")
    total = sum(1 for _ in example.read_lines(annotations))
    if not total:
        raise BuildError(f"{annotations}: the file is empty, expected one JSON object a line")
    workers = args.workers or (0 if total < INLINE_LINES else os.cpu_count() or 1)

    found = survey(annotations, folder, workers=workers, total=total, read_lines=read_lines)
    too_many = found.faulty_lines > args.max_faults * found.lines or not found.ids
    listed = target.parent / "faults.jsonl"
    print(printable.plain(found.summary()), file=sys.stderr)
    if too_many:
        if not target.exists():  # a set that stays keeps the list of its own faults
            found.write_faults(listed)
        raise BuildError(
            f"{annotations}: {found.faulty_lines} of {found.lines} lines are faulty, more than"
            f" --max-faults {args.max_faults:g} allows; no records were written"
        )
    division = divide(found, args, workers)
    for what, count in (
        ("are of other sets and left out", division.left_out),
        ("are the file of an earlier line", len(division.duplicates) - division.left_out),
        ("go to validation", len(division.validation)),
    ):
        if count:
            print(f"{annotations}: {count} of {len(found.ids)} images {what}", file=sys.stderr)
    encoding = example.Encoding(args.encoding.kind, args.encoding.quality, args.store_size or 0)
    bytes_each = _stored_bytes(found, encoding) / len(found.ids)

    def default_shards(ids: dict[int, str]) -> int:
        return default_num_shards(len(ids), int(len(ids) * bytes_each))

    num_shards = args.num_shards or default_shards(division.train)
    if num_shards > len(division.train):
        raise BuildError(
            f"--num-shards {num_shards}: there are {len(division.train)} good lines, expected at most"
            " one shard each"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the faults are what people should read
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences a banner
    from data import tfds_writer  # TensorFlow: slow to start, so after the checks
    from grain_jax.input_pipeline import text_lengths, tokenizer

    rescued: list[int] = []
    lengths = text_lengths.Sample()
    of = functools.partial(
        examples,
        annotations=annotations,
        folder=folder,
        encoding=encoding,
        workers=workers,
        rescued=rescued,
        read_lines=read_lines,
    )
    tfds_writer.write(
        target,
        examples=lengths.watch(of(division.train)),
        encoding_format=encoding.tfds_format,
        metadata={
            "store_size": encoding.size,
            "encoding": str(encoding),
            "faulty_lines": found.faulty_lines,
            "boxes_clipped": found.boxes_clipped,
            "duplicates_left_out": division.left_out,
        },
        num_shards=num_shards,
        held_out=of(division.validation),
        held_out_shards=default_shards(division.validation),
        files=lambda: {
            duplicates.FILE: duplicates.encode(division.fingerprints),
            "duplicates.jsonl": "".join(
                json.dumps(line) + "\n" for line in division.duplicates
            ).encode(),
            text_lengths.FILE: lengths.encode(args.name, tokenizer.ClipTokenizer()),
        },
    )
    if rescued:
        print(
            f"{annotations}: {len(rescued)} of {len(found.ids)} images stored as PNG, since training cannot"
            f" read their files; the first is line {min(rescued)}'s",
            file=sys.stderr,
        )
    found.write_faults(listed)  # after the records: the list is of the set that is there
    sizes = f"{len(division.train)} images"
    if division.validation:
        sizes += f" and {len(division.validation)} held out"
    return (
        f"{target}: {sizes}, {division.regions} regions, {num_shards} shards,"
        f" {time.monotonic() - start:.1f} s"
    )


def of_system(error: OSError, output: epath.PathLike) -> str:
    """A line about what the system refused: a full or read-only disk, a file in a folder's place."""
    reason = f"{error.filename or output}: {error.strerror or error}"
    return f"{reason}; no set was changed; make room, or give another --output"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parser().parse_args(argv)
    try:
        print(build(args))
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(of_system(error, args.output), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
