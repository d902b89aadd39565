"""Images -> captions, descriptions and boxes of an MLLM and a detector, on Apache Beam (docs/annotate.md).

The same command again resumes an interrupted job. Further arguments, from --runner on, go to Beam.
"""

import collections
import functools
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax.cli import process
from grain_jax.core import errors
from grain_jax.data import job, negatives, sources, staging
from grain_jax.data.annotate import LINES, chat, local_models, passes
from grain_jax.data.annotate.arguments import Annotate

FAILED = "failed.jsonl"
_OF_SOURCE = "source option images annotations split label_text shard_size min_side max_side".split()


def annotate(args: Annotate) -> str:
    """Runs the job; returns a line about its results. Raises UserError."""
    # Beam complains that Google's packages are missing, which only its Google runners need.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
    try:
        from grain_jax.data.annotate import pipeline
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"{error}; install what annotation needs: pip install 'grain_jax[annotate]'"
        ) from None
    if not args.images and not args.source:
        raise errors.UserError("--images DIR: missing; folder of images, or of tar shards")
    args.source = args.source or sources.of_path(epath.Path(args.images))
    source = sources.make(args.source, dict(args.option))
    args.keep_images &= not source.images_are_files
    output, marks = job.Output(args.output), passes.marks(args)
    # A shard's lines are composed of the results of all passes, so two runs would overwrite each other's.
    with staging.locked(output.path(LINES), "--output"):
        start = time.monotonic()
        output.agree(_settings(args))
        shards = sources.of_flags(args, str(output.path("lists")), args.shard_size)
        passes.unmark_damaged(args, output, [shard.name for shard in shards])
        done = output.done(*marks)
        todo = [shard for shard in shards if shard.name not in done]
        if todo:
            needed = passes.NEEDS.get(args.passes[0]) if args.passes else None
            if needed and (missing := {x.name for x in todo} - output.done(f"passes/{needed}")):
                raise errors.UserError(
                    f"--passes {','.join(args.passes)}: {len(missing)} shards have no results of"
                    f" the pass {needed} yet; run --passes {needed} first"
                )
            pipeline.run(args, todo)
            missing = {shard.name for shard in todo} - output.done(*marks)
            if missing:  # runners return from a job that somebody cancelled
                raise errors.UserError(
                    f"--output {args.output}: the job ended with {len(missing)} of {len(shards)} shards"
                    " not done; give the same command again"
                )
        total = _finish(args, output, [shard.name for shard in shards])
    return (
        f"{output.path(LINES)}: {total['annotated']} of {total['images']} images,"
        f" {total['regions']} regions, {len(todo)} of {len(shards)} shards in this run,"
        f" {time.monotonic() - start:.1f} s"
    )


def _settings(args: Annotate) -> dict[str, dict[str, Any]]:
    """The settings of the source and of each pass, which results depend on."""
    model = args.chat or local_models.CHAT_MODEL
    settings: dict[str, dict[str, Any]] = {
        "source": {name: getattr(args, name) for name in _OF_SOURCE},
        "ground": {"detector": args.detector, "threshold": args.threshold},
        "negatives": {"rules": negatives.VERSION, "negatives": args.negatives},
    }
    settings |= {x: {"model": model, "prompt": chat.prompt(x)} for x in ("caption", "describe")}
    return {name: settings[name] for name in ("source", *args.passes)}


def _finish(args: Annotate, output: job.Output, names: Sequence[str]) -> Mapping[str, int]:
    """Joins the files of the shards; returns their numbers. Raises errors.UserError for too many faults."""
    output.join("annotations", names, LINES)
    output.join("failed", names, FAILED)
    total = collections.Counter()
    for name in names:
        total.update(output.read_record(*passes.record_of(name))["counts"])
    faults = {x.removeprefix(passes.FAULT): n for x, n in total.items() if x.startswith(passes.FAULT)}
    summary = {"total": total, "settings": _settings(args)}
    output.put(json.dumps(summary, indent=1) + "\n", "summary.json")
    images, faulty, left = (total[name] for name in ("images", "faulty", "annotated"))
    file, most = output.path(FAILED), args.max_faults
    job.check_faults(file, faults, images=images, faulty=faulty, left=left, most=most)
    return total


main = functools.partial(process.console, Annotate, annotate)


if __name__ == "__main__":
    sys.exit(main(None))
