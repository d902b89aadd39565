"""Finds the largest batch, the cheapest remat policy that fits and the faster ring, in few compiles.

Memory grows nearly linearly with the images of a chip, so two answers predict where the limit is; each
prediction is compiled, never trusted.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from grain_jax import config as config_lib
from grain_jax import errors, losses

MAX_COMPILES = 8
GOAL = 0.97  # of the limit: what a prediction aims at
GATHER = 4  # chips that share columns before the ring: what is tried against none
DERIVED_GROUP = (
    8  # images a packing group, at least, of the batches that are tried where it is derived
)
GROWTH = 4  # times the last batch, at most: a line does not reach further


class Answer(NamedTuple):
    """The result of compiling a point; bytes are of one chip."""

    fits: bool
    total_bytes: int
    limit_bytes: int
    images_per_second: float | None  # None: out of memory


class Point(NamedTuple):
    """A point that was tried."""

    remat: str
    gather: int
    images_per_chip: int
    answer: Answer


class Found(NamedTuple):
    """All points in order of trial, the cheapest policy for the config's own batch, and the largest batch."""

    tried: list[Point]
    at_batch: Point | None
    largest: Point | None


def unit(config: config_lib.Config, shards: int) -> int:
    """The smallest step in images per chip that keeps every division of the batch whole.

    Args:
      shards: parts that the batch is cut into (data x fsdp).
    """
    group = (config.text.pack_group or DERIVED_GROUP) if config.text.packing else 1
    whole = math.lcm(
        shards * config.microbatches * group,
        (config.input.lanes or 1) * group,
        config.loss.group_size or 1,
    )
    return whole // shards


def search(
    config: config_lib.Config,
    shards: int,
    ask: Callable[[config_lib.Config], Answer | None],
    *,
    max_compiles: int = MAX_COMPILES,
) -> Found:
    """Tries the remat policies at the config's batch, cheapest first, then `loss.gather`, then larger batches.

    Args:
      config: where to start.
      shards: parts that the batch is cut into.
      ask: compiles a config; None, when it took too long, ends the search with what was found.
      max_compiles: at most so many calls of `ask`.

    Raises:
      UserError: the config's batch does not divide over the shards.
    """
    if config.batch_size % shards:
        raise errors.UserError(
            f"batch_size: got {config.batch_size}, expected a multiple of data x fsdp = {shards}"
        )
    tried: list[Point] = []
    start, step = config.batch_size // shards, unit(config, shards)

    def points():
        """The points to try next."""
        for remat in config_lib.REMAT_POLICIES:  # from least recomputation to least memory
            yield remat, start, config.loss.gather
            if tried[-1].answer.fits:
                if config.loss.gather == 1 and _can_gather(config, shards):
                    yield remat, start, GATHER
                break
        # The policy that needs least memory carries the largest batch.
        remat, gather = config_lib.REMAT_POLICIES[-1], config.loss.gather
        while True:
            mine = [p for p in tried if (p.remat, p.gather) == (remat, gather)]
            fitting = max((p.images_per_chip for p in mine if p.answer.fits), default=0)
            failing = min((p.images_per_chip for p in mine if not p.answer.fits), default=math.inf)
            if failing - fitting <= step:
                return
            images = _predict(mine, start, step, fitting, failing)
            while images > fitting and not _groups_fit(config, images, shards):
                images -= step
            if images <= fitting:
                return
            yield remat, images, gather

    for remat, images, gather in itertools.islice(points(), max_compiles):
        loss = dataclasses.replace(config.loss, gather=gather)
        answer = ask(
            dataclasses.replace(config, remat=remat, batch_size=images * shards, loss=loss)
        )
        if answer is None:
            break
        tried.append(Point(remat, gather, images, answer))

    fits = [p for p in tried if p.answer.fits]
    at_batch = [p for p in fits if p.images_per_chip == start]
    if at_batch:  # of the first policy that fits, the faster ring
        at_batch = [p for p in at_batch if p.remat == at_batch[0].remat]
    return Found(
        tried,
        max(at_batch, key=lambda p: p.answer.images_per_second or 0, default=None),
        max(fits, key=lambda p: p.images_per_chip, default=None),
    )


def _can_gather(config: config_lib.Config, shards: int) -> bool:
    """Whether more than one group of `GATHER` neighbours remains for the ring."""
    group = (config.loss.group_size or config.batch_size) * shards // config.batch_size
    return shards > GATHER and shards % GATHER == 0 and (group <= 1 or group % GATHER == 0)


def _groups_fit(config: config_lib.Config, images: int, shards: int) -> bool:
    """Whether the groups of `loss.group_size` divide over chips that have so many images."""
    try:
        losses.make_layout(images * shards, config.loss, shards)
    except errors.UserError:
        return False
    return True


def _predict(points: list[Point], start: int, step: int, fitting: int, failing: float) -> int:
    """The next number of images: where the line through the last two points meets the goal, in steps."""
    if not points:
        return max(start // step, 1) * step
    last = points[-1]
    images, total = last.images_per_chip, last.answer.total_bytes
    goal = GOAL * last.answer.limit_bytes
    if len(points) > 1:
        before = points[-2]
        slope = (total - before.answer.total_bytes) / (images - before.images_per_chip)
    else:
        slope = total / images  # too steep, as the state does not grow: the next try is a safe one
    guess = images + (goal - total) / slope if slope > 0 else math.inf
    guess = min(guess, GROWTH * images)
    lowest, highest = fitting + step, failing - step
    return int(min(max(guess // step * step, lowest), highest))
