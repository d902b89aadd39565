"""The CPU time of an image in each stage of our input pipeline."""

import contextlib
import time
from collections.abc import Callable
from unittest import mock

import jax
import tensorflow as tf

from benchmarks.input import made
from grain_jax.input_pipeline import assemble, device, records, transforms

STAGES = {
    "tokenize": "tokenise",
    "assemble": "pack",
}  # functions of `assemble` that are timed directly


def side(folder: str, name: str, count: int, take: Callable) -> dict[str, Callable]:
    """A callable that runs a turn of `count` batches of a set and returns {stage: CPU ms an image} of all so far.

    The time of a stage is the difference to a pipeline without it; the text stages are timed directly. `take` takes
    batches that were prefetched, or lets the side prefetch again.
    """
    config = made.config(folder, name)
    spent = dict.fromkeys(STAGES.values(), 0.0)

    def counted(stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            began = time.thread_time()
            out = function(*args, **kwargs)
            spent[stage] += time.thread_time() - began
            return out

        return run

    # Replacements of almost no cost that depend on the same inputs, so that TensorFlow does not prune earlier stages.
    def flat(number):
        return tf.fill([made.SIZE, made.SIZE, 3], tf.cast(number % 2, tf.uint8))

    def constant(record, draws):
        regions = config.input.max_regions
        return dict(
            image=flat(tf.strings.length(record)),
            captions=tf.constant(["a bird"]),
            caption_mask=tf.constant([True]),
            descriptions=tf.fill([regions], "a wing"),
            region_boxes_cxcywh=tf.zeros([regions, 4]) + 0 * draws[0],
            region_mask=tf.ones([regions], tf.bool),
            region_scores=tf.ones([regions]),
            flipped=tf.constant(False),
            negatives=tf.fill([regions, 0], ""),
            negative_mask=tf.ones([regions, 0], tf.bool),
        )

    replaced = lambda name, by: mock.patch.object(transforms, name, by)
    no_resize = replaced("resize", lambda image, size: flat(tf.shape(image)[0]))
    no_decode = replaced("decode", lambda encoded: flat(tf.strings.length(encoded)))
    nothing = replaced("Transform", lambda config: constant)
    without = {
        "whole": (),
        "no resize": (no_resize,),
        "no image": (no_resize, no_decode),
        "read": (nothing,),
    }
    pipelines = {what: records.batches(config) for what in without}
    for what, patches in without.items():
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            next(pipelines[what])  # builds the graph
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    turns: list[dict[str, float]] = []
    each = 1000 / (count * made.BATCH)  # seconds of a turn -> ms an image

    def turn() -> list[dict[str, float]]:
        total, texts = {}, {}
        for what, batches in pipelines.items():
            take(batches)
            spent.update(dict.fromkeys(spent, 0.0))
            began = time.process_time()
            for _ in range(count):
                batch = next(batches)
            total[what] = each * (time.process_time() - began)
            texts[what] = {stage: each * seconds for stage, seconds in spent.items()}
            take(None)
        began = time.process_time()
        for _ in range(count):
            jax.block_until_ready(device.shard_batch(batch, sharding))
        to_device = each * (time.process_time() - began)
        read = total["read"] - sum(texts["read"].values())
        parse = total["no image"] - sum(texts["no image"].values()) - read
        images = {
            "decode": total["no resize"] - total["no image"],
            "resize": total["whole"] - total["no resize"],
        }
        out = {"read, order, batch": read, "parse, choose": parse} | images
        turns.append(out | texts["whole"] | {"to the device": to_device})
        return turns

    for function, stage in STAGES.items():
        setattr(assemble, function, counted(stage, getattr(assemble, function)))
    return {name: turn}
