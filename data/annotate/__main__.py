"""Images -> captions, descriptions and boxes of an MLLM and a detector, on Apache Beam (docs/annotate.md).

  grain-jax annotate --images FOLDER_OR_SHARDS --output DIR [--passes caption,describe] ...

The same command again resumes an interrupted job. Further arguments, from --runner on, go to Beam.
"""

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from grain_jax.core import errors
from grain_jax.data import build, example, negatives, sources
from grain_jax.data.annotate import (
    arguments,
    checks,
    detector,
    endpoint_chat,
    local_chat,
    outputs,
    prompt,
)
from grain_jax.data.annotate.passes import PASSES, Job
from grain_jax.data.arguments import Build

# Requests that wait for each one that an endpoint answers at a time: none waits for a slow one.
BATCHES_AHEAD = 4


class AnnotateError(errors.UserError):
    """The job cannot run, or its faults are too many; the message is one line."""


def annotate(args: argparse.Namespace) -> str:
    """Runs the job; returns a line about its results. Raises UserError."""
    # Beam complains where Google's packages are missing, which only its Google runners need.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
    try:
        from grain_jax.data.annotate import pipeline
    except ModuleNotFoundError as error:
        raise AnnotateError(
            f"{error}; install what annotation needs: pip install 'grain_jax[annotate]'"
        ) from None
    start = time.monotonic()
    pipeline.check(args.beam)
    output = outputs.Output(args.output)
    name, own = arguments.source_name(args), dict(args.option)
    source = sources.make(name, own)
    args.orientation = getattr(source, "orientation", args.orientation)
    job = _job(args, output, source)
    records = _arguments_of_build(args, source) if args.name else None
    settings = _settings(args, job)
    output.agree(settings)
    options = sources.Options(
        images=args.images,
        annotations=tuple(args.annotations),
        split=args.split,
        scratch=str(output.path("lists")),
        shard_size=args.shard_size,
        orientation=args.orientation,
    )
    shards = sources.shards(name, options, own)
    todo = _todo(job, shards, args.retry_failed)
    counters = {}
    if todo:
        counters = pipeline.run(job, todo, args.beam, retry_failed=args.retry_failed)
        missing = {shard.name for shard in todo} - output.finished(job.passes)
        if missing:  # runners return from a job that somebody cancelled
            raise AnnotateError(
                f"--output {args.output}: the job ended with {len(missing)} of {len(shards)} shards not"
                " done; give the same command again"
            )
    seconds, images = time.monotonic() - start, counters.get("pictures", 0)
    names = [shard.name for shard in shards]
    output.join(names)
    total = output.summary(names)
    summary = {
        "total": total,
        "regions per picture": round(total["regions"] / max(1, total["annotated"]), 3),
        "model rates": {  # of one worker: while its model ran
            name: {"images/s": round(found["pictures"] / found["seconds"], 3)}
            for name, found in total["passes"].items()
            if found.get("seconds")
        },
        "this run": {
            "pictures": images,
            "seconds": round(seconds, 3),
            "images/s": round(images / seconds, 3),
        },
        "settings": settings,
    }
    output.put(json.dumps(summary, indent=1) + "\n", "summary.json")
    output.clear()
    _check_faults(total, output, args.max_faults)
    if records:
        read_lines = example.read_lines
        if not source.images_are_files:
            read_lines = lambda annotations: _lines_with_images(output, shards)
        print(build.build(records, read_lines))
    return (
        f"{output.path('A.jsonl')}: {total['annotated']} of {total['pictures']} images,"
        f" {total['regions']} regions, {len(todo)} of {len(shards)} shards in this run,"
        f" {images} images in {seconds:.1f} s"
    )


def _check_faults(total: dict[str, Any], output: outputs.Output, max_faults: float) -> None:
    """Prints the counts of the faults. Raises AnnotateError where they are more than --max-faults allows."""
    for cause, count in sorted(total["failures"].items()):
        print(f"{output.path('failed.jsonl')}: {count} {cause}", file=sys.stderr)
    images = total["pictures"]
    if not total["annotated"]:
        raise AnnotateError(f"{output.folder}: none of {images} images could be annotated")
    if total["faulty"] > max_faults * images:
        raise AnnotateError(
            f"{output.folder}: {total['faulty']} of {images} images have a fault, more than"
            f" --max-faults {max_faults:g} allows; A.jsonl has what is left"
        )


def _job(args: argparse.Namespace, output: outputs.Output, source: sources.Source) -> Job:
    chat = local_chat.Options(
        model=args.chat or local_chat.Options().model, batch_size=args.batch_size
    )
    batch_size = args.batch_size
    if args.endpoint:
        if not args.chat:
            raise AnnotateError(
                "--endpoint: got no --chat, expected the model's name at the endpoint"
            )
        chat = endpoint_chat.Options(
            url=args.endpoint,
            model=args.chat,
            concurrency=args.concurrency,
            requests_per_second=args.requests_per_second,
            seconds=args.request_seconds,
            tries=args.tries,
        )
        batch_size = max(batch_size, BATCHES_AHEAD * args.concurrency)
    prompts = epath.Path(args.prompts) if args.prompts else prompt.FOLDER
    return Job(
        output=output,
        passes=args.passes,
        limits=checks.Limits(args.min_side, args.max_side),
        batch_size=batch_size,
        keep_images=args.keep_images and not (source.images_are_files or args.name),
        chat=chat,
        detector=detector.Options(
            model=args.detector, threshold=args.threshold, batch_size=args.batch_size
        ),
        prompts={
            name: prompt.read_prompt(prompts / f"{name}.txt", with_subject=name == "describe")
            for name in ("caption", "describe")
        },
        negatives=args.negatives,
    )


def _settings(args: argparse.Namespace, job: Job) -> dict[str, dict[str, Any]]:
    """The settings that results depend on: those of the source, and of each pass."""
    out: dict[str, dict[str, Any]] = {
        "source": {
            "name": arguments.source_name(args),
            "options": dict(args.option),
            "images": args.images,
            "annotations": args.annotations,
            "split": args.split,
            "shard size": args.shard_size,
            "limits": list(job.limits),
            "orientation": args.orientation,
        }
    }
    for name in job.passes:
        if name == "ground":
            out[name] = {"model": job.detector.model, "threshold": job.detector.threshold}
        elif name == "negatives":
            out[name] = {"rules": negatives.VERSION, "negatives": job.negatives}
        else:
            asked = job.prompts[name]
            digest = hashlib.sha256(asked.text.encode()).hexdigest()
            out[name] = {
                "model": job.chat.model,
                "prompt version": asked.version,
                "prompt sha256": digest[:16],
            }
    return out


def _arguments_of_build(args: argparse.Namespace, source: sources.Source) -> argparse.Namespace:
    """The arguments of grain-jax build; wrong ones end the command before any work."""
    given = {
        "annotations": str(epath.Path(args.output) / "A.jsonl"),
        "images": args.images if source.images_are_files else args.output,
        "output": str(epath.Path(args.output) / "records"),
        "name": args.name,
    }
    for name in ("orientation", "store_size", "encoding", "num_shards", "max_faults"):
        given[name.replace("_", "-")] = getattr(args, name)
    pairs = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return Build.parse([*pairs, "--overwrite"])


def _lines_with_images(
    output: outputs.Output, shards: Sequence[sources.SourceShard]
) -> Iterator[example.Line]:
    """The lines of A.jsonl with the images that the source has. Raises SourceError where it has others."""
    number = 0
    for shard in shards:
        lines = iter(output.read("annotations", shard.name))
        line = next(lines, None)
        for item in sources.read(shard):
            if line and isinstance(item, sources.Image) and item.image == line["image"]:
                number += 1
                yield example.Line(number, json.dumps(line).encode(), item.encoded)
                line = next(lines, None)
        if line:
            raise sources.SourceError(
                f"source {shard.source}: got no image {line['image']}, which was there when it was"
                " annotated, expected the same source; give another --output"
            )


def _todo(
    job: Job, shards: Sequence[sources.SourceShard], retry_failed: bool
) -> list[sources.SourceShard]:
    """The shards that the passes have not done. Raises AnnotateError where an earlier pass is missing."""
    finished = job.output.finished(job.passes)
    todo = [
        shard
        for shard in shards
        if shard.name not in finished or (retry_failed and _has_gaps(job.output.tally(shard.name)))
    ]
    needs = PASSES[job.passes[0]].needs if job.passes else None
    if needs:
        missing = {shard.name for shard in todo} - job.output.finished([needs])
        if missing:
            raise AnnotateError(
                f"--passes {','.join(job.passes)}: {len(missing)} of {len(shards)} shards have no"
                f" results of the pass {needs} yet; run --passes {needs} first"
            )
    return todo


def _has_gaps(tally: dict[str, Any]) -> bool:
    """Whether a shard has failures, or a pass has not yet run for what an earlier one found on a retry."""
    return bool(tally.get("failures")) or len(set(tally.get("results", {}).values())) > 1


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        args = arguments.Annotate.parse(argv)
        try:
            print(annotate(args))
        except OSError as error:
            raise AnnotateError(build.of_system(error, args.output)) from None
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
