"""Images -> captions, descriptions and boxes of an MLLM and a detector, on Apache Beam (docs/annotate.md).

  grain-jax annotate --images FOLDER_OR_SHARDS --output DIR [--passes caption,describe] ...

The same command again resumes an interrupted job. Further arguments, from --runner on, go to Beam.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from grain_jax.core import errors
from grain_jax.data import build, negatives, sources, staging
from grain_jax.data.annotate import annotated, local_chat, outputs, prompt
from grain_jax.data.annotate.arguments import Annotate
from grain_jax.data.annotate.passes import NEEDS, Job
from grain_jax.data.arguments import Build


class AnnotateError(errors.UserError):
    """The job cannot run, or its faults are too many; the message is one line."""


def annotate(args: Annotate) -> str:
    """Runs the job; returns a line about its results. Raises UserError."""
    # Beam complains where Google's packages are missing, which only its Google runners need.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
    try:
        from grain_jax.data.annotate import pipeline
    except ModuleNotFoundError as error:
        raise AnnotateError(
            f"{error}; install what annotation needs: pip install 'grain_jax[annotate]'"
        ) from None
    pipeline.check(args.beam)
    if not args.images and not args.source:
        raise AnnotateError("--images DIR: missing; folder of images, or of tar shards")
    args.source = args.source or _source_of(epath.Path(args.images))
    source = sources.make(args.source, dict(args.option))
    args.keep_images &= not (source.images_are_files or args.name)
    job = Job(args, _prompts(args))
    # A shard's lines are composed of the results of all passes, so two jobs would overwrite each other's.
    with staging.locked(job.output.path(outputs.LINES), "--output"):
        return _annotate(job, source)


def _annotate(job: Job, source: Any) -> str:
    """Runs a job that has its output for itself; returns a line about its results. Raises UserError."""
    from grain_jax.data.annotate import pipeline

    start, args, output = time.monotonic(), job.given, job.output
    settings = _settings(job)
    output.agree(settings)
    options = sources.Options(
        images=args.images,
        annotations=tuple(args.annotations),
        split=args.split,
        scratch=str(output.path("lists")),
        shard_size=args.shard_size,
        label_text=args.label_text,
    )
    shards = sources.shards(args.source, options, dict(args.option))
    todo = _todo(args, output, shards)
    if todo:
        pipeline.run(job, todo)
        missing = {shard.name for shard in todo} - output.finished(args.passes)
        if missing:  # runners return from a job that somebody cancelled
            raise AnnotateError(
                f"--output {args.output}: the job ended with {len(missing)} of {len(shards)} shards not"
                " done; give the same command again"
            )
    seconds, names = time.monotonic() - start, [shard.name for shard in shards]
    images = output.summary(shard.name for shard in todo).get("pictures", 0)
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
    if args.name:
        of_job = None if source.images_are_files else annotated.shards_of(args.output, shards)
        given = Build(
            annotations=[str(output.path("A.jsonl"))],
            images=args.images if source.images_are_files else args.output,
            output=str(output.path("records")),
            name=args.name,
            overwrite=True,
            max_faults=args.max_faults,
            store_size=args.store_size,
            encoding=args.encoding,
            num_shards=args.num_shards,
        )
        print(build.build(given, of_job))
    return (
        f"{output.path('A.jsonl')}: {total['annotated']} of {total['pictures']} images,"
        f" {total['regions']} regions, {len(todo)} of {len(shards)} shards in this run,"
        f" {images} images in {seconds:.1f} s"
    )


def _prompts(args: Annotate) -> dict[str, prompt.Prompt]:
    folder = epath.Path(args.prompts) if args.prompts else prompt.FOLDER
    return {
        name: prompt.read_prompt(folder / f"{name}.txt", with_subject=name == "describe")
        for name in ("caption", "describe")
    }


def _source_of(images: epath.Path) -> str:
    """`webdataset` for tar files and `folder` for images."""
    tars = images.suffix == ".tar" or (images.is_dir() and any(images.glob("*.tar")))
    return "webdataset" if tars else "folder"


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


def _settings(job: Job) -> dict[str, dict[str, Any]]:
    """The settings that results depend on: those of the source, and of each pass."""
    args = job.given
    out: dict[str, dict[str, Any]] = {
        "source": {
            "name": args.source,
            "options": dict(args.option),
            "images": args.images,
            "annotations": args.annotations,
            "split": args.split,
            "shard size": args.shard_size,
            "limits": [args.min_side, args.max_side],
            **({"label text": args.label_text} if args.label_text else {}),
        },
        "ground": {"model": args.detector, "threshold": args.threshold},
        "negatives": {"rules": negatives.VERSION, "negatives": args.negatives},
    }
    for name, asked in job.prompts.items():
        out[name] = {
            "model": args.chat or local_chat.MODEL,
            "prompt version": asked.version,
            "prompt sha256": hashlib.sha256(asked.text.encode()).hexdigest()[:16],
        }
    return {name: out[name] for name in ("source", *args.passes)}


def _todo(
    args: Annotate, output: outputs.Output, shards: Sequence[sources.SourceShard]
) -> list[sources.SourceShard]:
    """The shards that the passes have not done. Raises AnnotateError where an earlier pass is missing."""
    finished = output.finished(args.passes)
    todo = [
        shard
        for shard in shards
        if shard.name not in finished or (args.retry_failed and _has_gaps(output.tally(shard.name)))
    ]
    if before := NEEDS.get(args.passes[0]) if args.passes else None:
        missing = {shard.name for shard in todo} - output.finished([before])
        if missing:
            raise AnnotateError(
                f"--passes {','.join(args.passes)}: {len(missing)} of {len(shards)} shards have no"
                f" results of the pass {before} yet; run --passes {before} first"
            )
    return todo


def _has_gaps(tally: dict[str, Any]) -> bool:
    """Whether a shard has failures, or a pass has not yet run for what an earlier one found on a retry."""
    return bool(tally.get("failures")) or len(set(tally.get("results", {}).values())) > 1


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return build.console(Annotate, annotate, argv)


if __name__ == "__main__":
    sys.exit(main())
