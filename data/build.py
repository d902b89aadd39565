"""Annotations and images -> a TFDS-format record set (format: data/SCHEMA.md).

  grain-jax build --annotations A.jsonl --images DIR --output DIR --name NAME

With --source the images and their annotations are those of a data source.

First every line is checked and every image decoded: all faults are named, by file and line, before
anything is written. Then TFDS's writer makes OUTPUT/NAME/1.0.0.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from grain_jax.cli.parser import Command
from grain_jax.core import errors, printable, progress, regular_file
from grain_jax.data import (
    duplicates,
    example,
    parallel,
    source_lines,
    sources,
    staging,
    survey,
)
from grain_jax.data.arguments import Build, Encoding
from grain_jax.data.survey import BuildError

SHARD_BYTES = (
    64 << 20
)  # aimed at: the deterministic shuffle holds a block of shards, one by default, in memory
SHARD_MULTIPLE = 16  # so that 16 lanes (the default), or 2, 4, 8, get equal shares


def examples(
    lines: survey.Lines, ids: dict[int, str], encoding: Encoding, stored_anew: list[str]
) -> Iterator[dict]:
    """The lines of `ids` as examples. Raises BuildError where the input has changed after the check.

    Args:
      lines: all lines.
      ids: number -> id.
      encoding: of the images.
      stored_anew: gets the ids of the images that are stored as PNG, since training cannot read their files.
    """
    encoded = lines.map(example.encode, ids, encoding=encoding)
    good = progress.over(encoded, total=len(ids), what="writing")
    for identity, item in zip(ids.values(), good, strict=True):
        if isinstance(item, list):
            raise BuildError(f"{item[0]} (it was right when checked)")
        features, anew = item
        stored_anew += [identity] * anew
        yield features | {"id": identity}


def default_num_shards(num_examples: int, num_bytes: int) -> int:
    """64 MB a shard, in multiples of 16; few examples make at most one shard each."""
    wanted = max(1, -(-num_bytes // (SHARD_BYTES * SHARD_MULTIPLE))) * SHARD_MULTIPLE
    return min(wanted, num_examples)


def _default_shards(found: survey.Survey, ids: dict[int, str], encoding: Encoding) -> int:
    """By the size of the files, or by what photographs of the stored size take."""
    bytes_per_pixel = 0.4 if encoding.kind == "jpeg" else 1.8
    bytes_each = found.image_bytes / len(found.ids)
    if encoding.size:
        bytes_each = encoding.size**2 * bytes_per_pixel
    return default_num_shards(len(ids), int(len(ids) * bytes_each))


def build(args: Build, read_lines: survey.ReadLines = example.read_lines) -> str:
    """Builds the set; returns a line about it.

    Args:
      args: as `Build.parse` gives them.
      read_lines: gives the lines of `args.annotations`, with their images where these are no files.

    Raises:
      errors.UserError: wrong usage or wrong input.
      staging.BusyError: another process builds the same set.
      OSError: the output cannot be written.
    """
    start = time.monotonic()
    target = epath.Path(args.output) / args.name / example.VERSION
    # Said before a check that may take hours.
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise BuildError("grain-jax build needs tensorflow_datasets: pip install 'grain_jax[data]'")
    _check_places(args)
    with contextlib.ExitStack() as stack:
        stack.enter_context(staging.locked(target))
        staging.recover(target)
        if target.exists() and not args.overwrite:
            raise BuildError(f"{target}: a set is there already; --overwrite replaces it")
        if args.source:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            lines, total = _lines_of_source(args, args.source, scratch), None
        else:
            lines, total = _lines_of_file(args, read_lines)
        workers = lines.workers
        found = survey.take(lines, total)
        _check_faults(found, args, target)
        divided = survey.divide(
            found,
            holdout=args.holdout,
            exclude_duplicates_of=args.exclude_duplicates_of,
            workers=workers,
        )
        num_shards = _write(args, lines, found, divided, target)
        found.write_faults(_faults_file(target))  # after the records: the list is of the set there
    sizes = f"{len(divided.train)} images"
    if divided.validation:
        sizes += f" and {len(divided.validation)} held out"
    return (
        f"{target}: {sizes}, {divided.regions} regions, {num_shards} shards,"
        f" {time.monotonic() - start:.1f} s"
    )


def _check_places(args: Build) -> None:
    """Raises BuildError where the lines or the images are not there; a source says so of its own files."""
    if not args.source and not regular_file.is_one(args.annotations[0]):
        raise BuildError(
            f"--annotations {args.annotations[0]}: no such file, expected one JSON object a line"
        )
    if not args.source and not epath.Path(args.images).is_dir():
        raise BuildError(f"--images {args.images}: no such folder, expected the images")


def _lines_of_file(args: Build, read_lines: survey.ReadLines) -> tuple[survey.Lines, int]:
    """The lines of A.jsonl, and their number. Raises errors.UserError: there are none."""
    path = epath.Path(args.annotations[0])
    total = example.count_lines(path)
    workers = args.workers or parallel.default_workers(total)
    return survey.Lines(path, epath.Path(args.images), workers, read_lines), total


def _lines_of_source(args: Build, name: str, scratch: str) -> survey.Lines:
    """A line for each image of the source. Raises SourceError."""
    own = dict(args.option)
    made = sources.make(name, own)
    in_folder = made.images_are_files or not getattr(made, "needs_images", True)
    if args.images and in_folder and not epath.Path(args.images).is_dir():
        raise BuildError(f"--images {args.images}: no such folder, expected the images")
    options = sources.Options(
        images=args.images,
        annotations=tuple(args.annotations),
        split=args.split,
        scratch=scratch,
        label_text=args.label_text,
    )
    shards = sources.shards(name, options, own)
    rows = sum(one.arguments.get("rows", options.shard_size) for one in shards)
    workers = args.workers or parallel.default_workers(rows if len(shards) > 1 else 0)
    read = lambda path: source_lines.lines(shards)
    return survey.Lines(epath.Path(name), epath.Path(args.images), workers, read)


def _faults_file(target: epath.Path) -> epath.Path:
    return target.parent / "faults.jsonl"


def _check_faults(found: survey.Survey, args: Build, target: epath.Path) -> None:
    """Prints what the first pass found. Raises BuildError where it is more than --max-faults allows."""
    if found.turned:
        turned = f"{found.turned} of {found.lines} images {example.TURNED}"
        print(printable.plain(f"{found.file_name}: {turned}"), file=sys.stderr)
    print(printable.plain(found.summary()), file=sys.stderr)
    if not found.lines:
        raise BuildError(f"{found.file_name}: got no images, expected some")
    if found.faulty_lines <= args.max_faults * found.lines and found.ids:
        return
    if not target.exists():  # a set that stays keeps the list of its own faults
        found.write_faults(_faults_file(target))
    raise BuildError(
        f"{found.file_name}: {found.faulty_lines} of {found.lines} lines are faulty, more than"
        f" --max-faults {args.max_faults:g} allows; no records were written"
    )


def _write(
    args: Build,
    lines: survey.Lines,
    found: survey.Survey,
    divided: survey.Splits,
    target: epath.Path,
) -> int:
    """Writes the set; returns the number of shards of train. Raises BuildError."""
    encoding = args.stored
    num_shards = args.num_shards or _default_shards(found, divided.train, encoding)
    if num_shards > len(divided.train):
        raise BuildError(
            f"--num-shards {num_shards}: there are {len(divided.train)} good lines, expected at most"
            " one shard each"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the faults are what people should read
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences a banner
    from grain_jax.data import tfds_writer  # TensorFlow: slow to start, so after the checks
    from grain_jax.input_pipeline import text_lengths, tokenizer

    stored_anew: list[str] = []
    lengths = text_lengths.TextSample()
    tfds_writer.write(
        target,
        splits={
            "train": (
                lengths.watch(examples(lines, divided.train, encoding, stored_anew)),
                num_shards,
            ),
            "validation": (
                examples(lines, divided.validation, encoding, stored_anew),
                _default_shards(found, divided.validation, encoding),
            ),
        },
        encoding_format=encoding.tfds_format,
        metadata={
            "store_size": encoding.size,
            "encoding": str(encoding),
            "faulty_lines": found.faulty_lines,
            "boxes_clipped": found.boxes_clipped,
            "duplicates_left_out": divided.left_out,
        },
        negatives=found.negatives > 0,
        files=lambda: {
            duplicates.FILE: duplicates.encode(divided.fingerprints),
            "duplicates.jsonl": "".join(
                json.dumps(line) + "\n" for line in divided.duplicates
            ).encode(),
            text_lengths.FILE: lengths.encode(tokenizer.ClipTokenizer()),
        },
    )
    if stored_anew:
        print(
            f"{found.file_name}: {len(stored_anew)} of {len(found.ids)} images stored as PNG, since training"
            f" cannot read their files; the first is {printable.plain(stored_anew[0], 200)}",
            file=sys.stderr,
        )
    return num_shards


def of_system(error: OSError, output: epath.PathLike) -> str:
    """A line about an operation that the system refused: a full or read-only disk, a file in a folder's place."""
    reason = f"{error.filename or output}: {error.strerror or error}"
    return f"{reason}; no set was changed; make room, or give another --output"


def console(declared: type[Command], run: Callable[[Any], str], argv: list[str] | None) -> int:
    """Runs a command that writes to its --output; returns its exit status."""
    try:
        args = declared.parse(argv)
        try:
            print(run(args))
        except OSError as error:
            raise errors.UserError(of_system(error, args.output)) from None
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return console(Build, build, argv)


if __name__ == "__main__":
    sys.exit(main())
