"""Images to files of embeddings (docs/embed.md).

  grain-jax embed SOURCE --checkpoint MODEL --output DIR

The same command again goes on after a kill. Several processes (grain-jax local, SLURM, TPU slices) share the parts;
DIR is a folder that all of them see.
"""

import argparse
import collections
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import msgspec

from grain_jax import inference
from grain_jax.core import atomic, errors, images, patches, printable
from grain_jax.data.embed import arguments, embeddings, output, parts, pipeline
from grain_jax.runtime import compiled, distributed, processes, saved_model
from grain_jax.runtime.pretrained import NAMES


def embed(args: argparse.Namespace) -> str:
    """Embeds the source; returns a line about what was done. Every process calls it. Raises UserError."""
    began = time.monotonic()
    embeddings.pyarrow()  # where it is missing, before the model is read
    folder = parts.absolute(args.output)
    processes.run_together(lambda: saved_model.find(args.checkpoint))
    listed = processes.of_first(lambda: msgspec.to_builtins(_list(args, folder)))
    found = msgspec.convert(listed, parts.Listing)
    predictor = processes.run_together(lambda: _load(args))
    settings = _settings(args, found, predictor)
    processes.of_first(lambda: output.agree(folder, settings))
    job = output.Output(folder, settings, found.parts)
    done = processes.of_first(lambda: [[i, *part] for i, part in job.finished().items()])
    before = {i: embeddings.Part(*part) for i, *part in done}
    todo = [index for index in range(len(found.parts)) if index not in before]
    mine = [todo[i] for i in processes.share(len(todo))]
    most_faults = float("inf") if found.total is None else args.max_faults * found.total
    smaller = f"give --dtype bfloat16, or {errors.MORE_MEMORY}"
    with errors.out_of_memory_in_a_line("grain-jax embed", lambda: smaller):
        count = pipeline.run(
            job,
            mine,
            pipeline.encoder(predictor, args.boxes, args.texts),
            resize=_resize(predictor),
            threads=args.threads or max(2, os.cpu_count() or 1),
            label=args.source,
            known=found.total is not None,
            before=list(before.values()),
            most_faults=most_faults,
        )
    count = sum(processes.agree(None, count))
    return processes.of_first(lambda: _end(args, job, count, time.monotonic() - began))


def _list(args: argparse.Namespace, folder: Any) -> parts.Listing:
    folder.mkdir(parents=True, exist_ok=True)
    return parts.find(
        args.source,
        images=args.images,
        split=args.split,
        shard_size=args.shard_size,
        scratch=folder,
        boxes=args.boxes == "given",
        texts=args.texts,
        orientation=args.orientation,
    )


def _resize(predictor: Any) -> Callable[[Any], Any]:
    """Gives what the model gets of an image: a square, or its Patches."""
    image, length = predictor.model.image, predictor.sequence_length
    if length:
        return functools.partial(patches.of_image, patch=image.patch_size, length=length)
    return functools.partial(images.resize, size=image.image_size)


def _load(args: argparse.Namespace) -> inference.Predictor:
    length = args.sequence_length
    predictor = inference.load(args.checkpoint, args.dtype, sequence_length=length)
    if args.boxes == "given":
        predictor.encode_boxes([], [])  # refuses a model without a box head
    return predictor


def _settings(
    args: argparse.Namespace, found: parts.Listing, predictor: Any
) -> embeddings.Settings:
    """What the embeddings depend on."""
    model = predictor.model
    named = args.checkpoint in NAMES or "://" in args.checkpoint
    digests = saved_model.model_digests(model, jax.device_get(predictor.params))
    return embeddings.Settings(
        # Of a workdir, the checkpoint that was its newest.
        checkpoint=args.checkpoint if named else str(parts.absolute(predictor.folder)),
        model=embeddings.Digests(**digests),
        embed_dim=model.embed_dim,
        regions=args.boxes if args.boxes == "given" or predictor.has_regions else "",
        image_size=model.image.image_size,
        dtype=args.dtype,
        store=args.store or ("float16" if args.format == "npy" else "float32"),
        shard_size=args.shard_size,
        source=found.source,
        parts=len(found.parts),
        orientation="file" if found.source.kind == "records" else args.orientation,
        format=args.format,
        texts=args.texts,
        logit_scale=predictor.logit_scale,
        sequence_length=predictor.sequence_length,
    )


def _end(args: argparse.Namespace, job: output.Output, count: int, seconds: float) -> str:
    """Writes the faults and the card, when all parts are there; returns the line. Raises EmbedError."""
    found = job.finished()
    missing = [index for index in range(len(job.parts)) if index not in found]
    if missing:
        raise pipeline.EmbedError(
            f"--output {args.output}: {job.name(missing[0])} is missing, of {len(missing)} files; give the same"
            " command again"
        )
    done = [found[index] for index in sorted(found)]
    job.write_faults(done)
    atomic.write_text(job.folder / embeddings.CARD, output.card(job.settings, done, args.output))
    causes = collections.Counter(fault["cause"] for part in done for fault in part.faults)
    for cause, times in sorted(causes.items()):
        line = f"{job.folder / embeddings.FAULTS}: {times} {printable.plain(cause, 80)}"
        print(line, file=sys.stderr)
    rows, faults = sum(part.rows for part in done), sum(len(part.faults) for part in done)
    if not rows or faults > args.max_faults * (rows + faults):
        raise pipeline.EmbedError(
            f"--output {args.output}: {faults} of {rows + faults} images have a fault, more than --max-faults"
            f" {args.max_faults:g} allows; {embeddings.FAULTS} names them; put them right and delete the files"
            " that it names, or take them out of the source"
        )
    left_out = f" ({faults} left out: {embeddings.FAULTS})" if faults else ""
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
        compiled.use()
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
