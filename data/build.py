"""Annotations and images -> a TFDS-format record set (format: data/SCHEMA.md).

  grain-jax build --annotations A.jsonl --images DIR --output DIR --name NAME

A build is a job (`data.job`) over the shards of a data source. All faults are named before the set is
written from the parts of the shards (`data.survey`). After a kill, the same command uses whole parts.
"""

import dataclasses
import functools
import io
import itertools
import json
import sys
import time
import typing

import numpy as np
from etils import epath

from grain_jax.cli import process
from grain_jax.core import ahead, errors, printable, progress
from grain_jax.core.annotations import Fault
from grain_jax.data import duplicates, example, job, sources, staging, survey
from grain_jax.data.arguments import Build
from grain_jax.data.sources import columns
from grain_jax.input_pipeline import record_folders

SHARD_BYTES = 64 << 20  # aimed at: the deterministic shuffle holds a block of shards in memory
SHARD_MULTIPLE = 16  # so that 16 lanes (the default), or 2, 4, 8, get equal shares
IMAGES_PER_PART = 250
FAULTS = "faults.jsonl"  # beside the version's folder


def _default_shards(surveyed: survey.Survey, images: np.ndarray) -> int:
    """64 MB per shard, in multiples of 16; few examples make at most one shard each."""
    _, starts, ends = np.asarray(surveyed.spans, np.int64).reshape(-1, 3)[images].T
    num_bytes = int((ends - starts).sum())
    wanted = max(1, -(-num_bytes // (SHARD_BYTES * SHARD_MULTIPLE))) * SHARD_MULTIPLE
    return min(wanted, len(images))


def build(args: Build) -> str:
    """Builds the set; returns a line about it. Raises UserError, or OSError if it cannot be written."""
    start = time.monotonic()
    target = epath.Path(args.output) / args.name / record_folders.VERSION
    with staging.locked(target):
        staging.recover(target)
        if target.exists() and not args.overwrite:
            raise errors.UserError(f"{target}: a set is there already; --overwrite replaces it")
        output = job.Output(str(target.parent / f"incomplete.parts_{record_folders.VERSION}"))
        try:
            surveyed, written = _build(args, target, output)
        except Exception:  # the user may change an image before the next build
            output.path().rmtree(missing_ok=True)
            raise
        output.path().rmtree()
        # After the records: the list is of the set there.
        surveyed.write_faults(target.parent / FAULTS)
    return f"{target}: {written}, {time.monotonic() - start:.1f} s"


def _build(args: Build, target: epath.Path, output: job.Output) -> tuple[survey.Survey, str]:
    """Writes the set from parts in `output`; returns its images, and a line about it."""
    shards = sources.of_flags(args, str(output.path("lists")), IMAGES_PER_PART)
    total = sum(x.arguments.get("lines", x.arguments.get("rows", IMAGES_PER_PART)) for x in shards)
    known = all("lines" in x.arguments for x in shards)
    workers = args.workers or ahead.default_processes(total if len(shards) > 1 else 0)
    prepare = functools.partial(survey.prepare, output=output, encoding=args.stored)
    surveyed = survey.Survey(args.annotations[0] if args.source == "annotations" else args.source)
    parts = map(surveyed.add, ahead.in_processes(prepare, shards, workers))
    images = itertools.chain.from_iterable(parts)
    for _ in progress.over(images, total=total if known else None, what="reading"):
        pass
    _check_faults(surveyed, args, target, output)
    if not surveyed.counts["regions"] and (seen := _unread(args, shards[0])):
        print(printable.plain(f"{surveyed.name}: got no regions, but {seen}"), file=sys.stderr)
    others = args.exclude_duplicates_of
    divided = survey.divide(surveyed, holdout=args.holdout, exclude_duplicates_of=others)
    count = len(divided.train)
    num_shards = args.num_shards or _default_shards(surveyed, divided.train)
    if num_shards > count:
        got = f"there are {count} good lines"
        raise errors.UserError(f"--num-shards {num_shards}: {got}, expected at most one shard each")
    from grain_jax.input_pipeline import record_writer  # TensorFlow: slow to start, so after the checks

    train = progress.over(surveyed.examples(divided.train, output), total=count, what="writing")
    validation = surveyed.examples(divided.validation, output)
    np.save(fingerprints := io.BytesIO(), divided.fingerprints)
    listed = "".join(json.dumps(line) + "\n" for line in divided.duplicates)
    with staging.replacing(target) as folder:
        record_writer.write(
            folder,
            target.parent.name,
            splits={
                "train": (train, num_shards),
                "validation": (validation, _default_shards(surveyed, divided.validation)),
            },
            encoding_format=None if args.stored.kind == "original" else args.stored.kind,
            metadata={
                "store_size": args.stored.size,
                "encoding": str(args.stored),
                "faulty_lines": surveyed.faulty_lines,
                "boxes_clipped": surveyed.counts["boxes_clipped"],
                "duplicates_left_out": len(divided.duplicates),
            },
            negatives=surveyed.counts["negatives"] > 0,
            files={duplicates.FILE: fingerprints.getvalue(), "duplicates.jsonl": listed.encode()},
        )
    held_out = f" and {len(divided.validation)} held out" if len(divided.validation) else ""
    regions = f"{surveyed.regions_written} regions, {num_shards} shards"
    return surveyed, f"{count} images{held_out}, {regions}"


def _fitting(args: Build, output: job.Output) -> str:
    """Which box_format of the source fits its first images best; "" if it has no such option."""
    bad = {}
    for form in typing.get_args(columns.BoxFormat):
        trial = dataclasses.replace(args, option=[*args.option, ("box_format", form)])
        try:
            first, *_ = sources.of_flags(trial, str(output.path(f"lists_{form}")), IMAGES_PER_PART)
        except errors.UserError:
            return ""
        read = [x for x in itertools.islice(sources.read(first), IMAGES_PER_PART) if not isinstance(x, Fault)]
        bad[form] = sum(fault.cause == "bad box" for x in read for fault in x.left_out)
    best = min(bad, key=lambda form: bad[form])
    return f"; --option box_format={best} fits all but {bad[best]} of the first {len(read)} images' boxes"


def _unread(args: Build, shard: sources.SourceShard) -> str:
    """The boxes that the source has and no option names, in words; "" if there are none."""
    first_row = getattr(sources.make(args.source, dict(args.option)), "first_row", None)
    found = columns.unread_boxes(first_row(shard)) if first_row else ""
    return f"it has boxes; --option {found} reads them" if found else ""


def _check_faults(surveyed: survey.Survey, args: Build, target: epath.Path, output: job.Output) -> None:
    """Prints what is known of the images. Raises UserError: more faults than --max-faults allows."""
    if surveyed.turned:
        turned = f"{surveyed.turned} of {surveyed.lines} images {example.TURNED}"
        print(printable.plain(f"{surveyed.name}: {turned}"), file=sys.stderr)
    print(printable.plain(surveyed.summary()), file=sys.stderr)
    if not surveyed.lines:
        raise errors.UserError(f"{surveyed.name}: got no images, expected some")
    if files := [file for file, count in surveyed.pixel_boxes.items() if not count]:
        names = ", ".join(file or ", ".join(args.annotations) or surveyed.name for file in files)
        advice = f"{sources.base.AS_SHARES}; no records were written"
        raise errors.UserError(f"{names}: got {sources.base.ALL_SHARES}, expected pixels; {advice}")
    if args.max_faults < surveyed.bad_boxes:
        raise errors.UserError(
            f"{surveyed.name}: {surveyed.bad_boxes:.0%} of the boxes do not fit their images, more than"
            f" --max-faults {args.max_faults:g} allows{_fitting(args, output)}; no records were written"
        )
    if surveyed.faulty_lines <= args.max_faults * surveyed.lines and surveyed.ids:
        return
    if not target.exists():  # a set that stays keeps the list of its own faults
        surveyed.write_faults(target.parent / FAULTS)
    raise errors.UserError(
        f"{surveyed.name}: {surveyed.faulty_lines} of {surveyed.lines} lines are faulty, more than"
        f" --max-faults {args.max_faults:g} allows; no records were written"
    )


main = functools.partial(process.console, Build, build)


if __name__ == "__main__":
    sys.exit(main(None))
