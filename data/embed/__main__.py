"""Images to files of embeddings (docs/embed.md): grain-jax embed SOURCE --checkpoint MODEL --output DIR

The same command again goes on after a kill. Several processes (grain-jax local, SLURM, TPU slices) share the
parts; DIR is a folder that all of them see.
"""

import collections
import contextlib
import functools
import json
import os
import sys
import time

from etils import epath

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.cli import process
from grain_jax.core import atomic, errors
from grain_jax.data import job, sources, staging
from grain_jax.data.embed import arguments, output, pipeline
from grain_jax.data.sources import arrow_tables
from grain_jax.runtime import distributed, processes

FAULTS = "faults.jsonl"


def embed(args: arguments.Embed) -> str:
    """Embeds the source; returns a line about it, "" if another process says it. Raises UserError."""
    arrow_tables.pyarrow()  # before the model is read: it may be missing
    folder = job.Output(str(absolute(args.output)))
    distributed.keep_compiled_programs()
    distributed.initialize(args.coordinator, args.processes, args.process_id, args.heartbeat_seconds)
    with distributed.ending_together(args.heartbeat_seconds), contextlib.ExitStack() as stack:
        processes.run_together(lambda: saved_model.find(args.checkpoint))
        lock = staging.locked(folder.path(FAULTS), "--output")
        processes.of_first(lambda: stack.enter_context(lock))
        line = _embed(args, folder)
    return "" if processes.process_info()[0] else line


def _embed(args: arguments.Embed, folder: job.Output) -> str:
    """Embeds the source by a run that has the folder for itself."""
    began = time.monotonic()
    source, images, values = processes.of_first(lambda: find(args, folder))
    shards = [sources.SourceShard(*each) for each in values]
    predictor = processes.run_together(lambda: inference.load(args.checkpoint, dtype=args.dtype))
    settings = {
        "model": predictor.digests,
        "embed_dim": predictor.model.embed_dim,
        "regions": predictor.has_regions,
        "image_size": predictor.model.image.image_size,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
        "source": source,
    }
    processes.of_first(lambda: folder.agree(settings))
    result = output.Embeddings(folder, settings, shards, images)
    done = processes.of_first(lambda: list(result.done()))
    todo = [index for index in range(len(shards)) if index not in done]
    smaller = f"give --dtype bfloat16, or {errors.MORE_MEMORY}"
    with errors.out_of_memory_in_a_line("grain-jax embed", lambda: smaller):
        count = pipeline.run(
            result,
            [todo[i] for i in processes.share(len(todo))],
            pipeline.encoder(predictor),
            size=predictor.model.image.image_size,
            threads=args.threads or max(2, os.cpu_count() or 1),
        )
    count = sum(processes.agree(None, count))
    return processes.of_first(lambda: _finish(args, result, count, time.monotonic() - began))


def find(args: arguments.Embed, folder: job.Output) -> tuple[dict[str, str], str, list[sources.SourceShard]]:
    """Settings of the source, the folder that paths of images start from or "", the shards.

    `folder` gets the lists of a folder's images, which all processes read. Raises sources.SourceError.
    """
    path = absolute(args.source)
    kind = sources.of_path(path)
    images = absolute(args.images or path.parent) if kind == "annotations" else path
    scratch = str(folder.path("lists"))
    options = sources.Options(str(images), (str(path),), args.split, scratch, args.shard_size)
    shards = sources.shards(kind, options)
    names = atomic.digest(json.dumps([shard.name for shard in shards]).encode())[:16]
    settings = {"kind": kind, "path": str(path), "images": str(images), "split": args.split}
    in_files = kind in ("folder", "annotations")
    return settings | {"image_list": names}, str(images) if in_files else "", shards


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, ~ expanded and links followed; a URL stays."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _finish(args: arguments.Embed, result: output.Embeddings, count: int, seconds: float) -> str:
    """Writes the faults if all parts are there; returns a line. Raises errors.UserError."""
    done = result.done(check=False)
    missing = [index for index in range(len(result.parts)) if index not in done]
    if missing:
        raise errors.UserError(
            f"--output {args.output}: {result.path('done', missing[0])} is missing, one of"
            f" {len(missing)} files; give the same command again"
        )
    files = {index: {"file": result.path("metadata", index).name} for index in done}
    faults = [fault | files[index] for index, part in done.items() for fault in part.faults]
    result.folder.put_lines(faults, FAULTS)
    rows = sum(part.rows for part in done.values())
    job.check_faults(
        result.folder.path(FAULTS),
        collections.Counter(fault["cause"] for fault in faults),
        images=rows + len(faults),
        faulty=len(faults),
        left=rows,
        most=args.max_faults,
    )
    left_out = f" ({len(faults)} left out: {FAULTS})" if faults else ""
    return (
        f"{args.output}: {rows:,} images{left_out} in {len(done):,} files; {count:,} of them now, in"
        f" {seconds:.1f} s, {count / seconds:.3g} images/s"
    )


main = functools.partial(process.console, arguments.Embed, embed)


if __name__ == "__main__":
    sys.exit(main(None))
