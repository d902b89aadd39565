"""Images to files of embeddings (docs/embed.md).

  grain-jax embed SOURCE --checkpoint MODEL --output DIR

The same command again goes on after a kill. Several processes (grain-jax local, SLURM, TPU slices) share the parts;
DIR is a folder that all of them see.
"""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.checkpoint.pretrained import NAMES
from grain_jax.core import atomic, errors, printable
from grain_jax.data.embed import arguments, output, parts, pipeline
from grain_jax.data.sources import arrow_files
from grain_jax.runtime import distributed, processes


def embed(args: arguments.Embed) -> str:
    """Embeds the source; returns a line about what was done. Every process calls it. Raises UserError."""
    began = time.monotonic()
    arrow_files.pyarrow()  # where it is missing, before the model is read
    folder = parts.absolute(args.output)
    processes.run_together(lambda: saved_model.find(args.checkpoint))
    source = processes.of_first(lambda: _list(args, folder))
    predictor = processes.run_together(lambda: _load(args))
    settings = _settings(args, source, predictor)
    processes.of_first(lambda: output.agree(folder, settings))
    job = output.Output(folder, settings, source["parts"], source["images"])
    done = processes.of_first(lambda: list(job.finished()))
    todo = [index for index in range(len(job.parts)) if index not in done]
    smaller = f"give --dtype bfloat16, or {errors.MORE_MEMORY}"
    with errors.out_of_memory_in_a_line("grain-jax embed", lambda: smaller):
        count = pipeline.run(
            job,
            [todo[i] for i in processes.share(len(todo))],
            pipeline.encoder(predictor, args.boxes),
            size=predictor.model.image.image_size,
            threads=args.threads or max(2, os.cpu_count() or 1),
            label=args.source,
            known=source["total"] is not None,
        )
    count = sum(processes.agree(None, count))
    return processes.of_first(lambda: _end(args, job, count, time.monotonic() - began))


def _list(args: arguments.Embed, folder: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return parts.find(
        args.source,
        images=args.images,
        split=args.split,
        shard_size=args.shard_size,
        scratch=folder,
        boxes=args.boxes == "given",
    )


def _load(args: arguments.Embed) -> inference.Predictor:
    predictor = inference.load(args.checkpoint, args.dtype)
    if args.boxes == "given":
        predictor.encode_boxes([], [])  # refuses a model without a box head
    return predictor


def _settings(
    args: arguments.Embed, source: dict[str, Any], predictor: inference.Predictor
) -> dict[str, Any]:
    """What the embeddings depend on."""
    named = args.checkpoint in NAMES or "://" in args.checkpoint
    return {
        # Of a workdir, the checkpoint that was its newest.
        "checkpoint": args.checkpoint if named else str(parts.absolute(predictor.folder)),
        "model": predictor.digests,
        "embed_dim": predictor.model.embed_dim,
        "regions": args.boxes if args.boxes == "given" or predictor.has_regions else "",
        "image_size": predictor.model.image.image_size,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
        "source": source["source"] | {"images": source["images"], "split": args.split},
    }


def _end(args: arguments.Embed, job: output.Output, count: int, seconds: float) -> str:
    """Writes the faults and the card, when all parts are there; returns the line. Raises EmbedError."""
    finished = job.finished()
    missing = [index for index in range(len(job.parts)) if index not in finished]
    if missing:
        raise output.EmbedError(
            f"--output {args.output}: {job.path('metadata', missing[0])} is missing, of {len(missing)} files; give"
            " the same command again"
        )
    done = [finished[index] for index in sorted(finished)]
    job.write_faults(done)
    atomic.write_text(job.folder / output.CARD, output.card(job.settings, done))
    causes = collections.Counter(fault["cause"] for part in done for fault in part.faults)
    for cause, times in sorted(causes.items()):
        line = f"{job.folder / output.FAULTS}: {times} {printable.plain(cause, 80)}"
        print(line, file=sys.stderr)
    rows, faults = sum(part.rows for part in done), sum(len(part.faults) for part in done)
    if not rows or faults > args.max_faults * (rows + faults):
        raise output.EmbedError(
            f"--output {args.output}: {faults} of {rows + faults} images have a fault, more than --max-faults"
            f" {args.max_faults:g} allows; {output.FAULTS} names them; put them right and delete the files"
            " that it names, or take them out of the source"
        )
    left_out = f" ({faults} left out: {output.FAULTS})" if faults else ""
    return (
        f"{args.output}: {rows:,} images{left_out} in {len(done):,} files; {count:,} of them now, in"
        f" {seconds:.1f} s, {count / seconds:.3g} images/s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of record sets and object stores
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        args = arguments.Embed.parse(argv)
        distributed.keep_compiled_programs()
        distributed.initialize(
            args.coordinator, args.processes, args.process_id, args.heartbeat_seconds
        )
        together = contextlib.nullcontext()
        if jax.distributed.is_initialized():
            together = distributed.ending_together(args.heartbeat_seconds)
        with together:
            try:
                said = embed(args)
            except OSError as error:
                reason = f"{error.filename or args.output}: {error.strerror or error}"
                raise errors.UserError(
                    f"{reason}; make room or allow it, then give the same command again"
                ) from None
        if processes.process_info()[0] == 0:
            print(said)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
