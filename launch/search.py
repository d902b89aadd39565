"""Finds the cheapest remat policy that fits, what is fastest with it, and the largest batch, in few compiles.

Memory grows nearly linearly with the images of a chip, so two answers predict where the limit is; each
prediction is compiled, never trusted.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.core import errors
from grain_jax.training import sharding

MAX_COMPILES = 10
GOAL = 0.97  # of the limit: what a prediction aims at
GATHERS = (4, 16)  # chips that share columns before the ring: tried while each is faster
FSDP = 4  # chips that share parameters: what is tried against none
DERIVED_GROUP = (
    8  # images of a packing group, at least, of batches that are tried where it is derived
)
GROWTH = 4  # times the last batch, at most: a line does not reach further


class Answer(NamedTuple):
    """The result of compiling a point; bytes are of one chip."""

    fits: bool
    total_bytes: int
    limit_bytes: int
    images_per_second: float | None  # None: out of memory
    failed: bool = False  # the compiler crashed or refused the program; bytes are not known


class Levers(NamedTuple):
    """The keys that are tried: remat, model.attention, mesh.fsdp and loss.gather."""

    remat: str
    attention: str
    fsdp: int
    gather: int


class Point(NamedTuple):
    """A point that was tried."""

    levers: Levers
    images_per_chip: int
    answer: Answer


class Found(NamedTuple):
    """All points in order of trial, the best for the config's own batch, and the largest batch."""

    tried: list[Point]
    at_batch: Point | None
    largest: Point | None


def unit(config: config_lib.Config, shards: int) -> int:
    """The smallest step in images per chip that keeps every division of the batch whole.

    Args:
      shards: parts that the batch is cut into (data x fsdp).
    """
    return sharding.least_batch(config, shards, DERIVED_GROUP) // shards


def search(
    config: config_lib.Config,
    shards: int,
    ask: Callable[[config_lib.Config], Answer | None],
    *,
    slices: int = 1,
    max_compiles: int = MAX_COMPILES,
) -> Found:
    """Tries the remat policies at the config's batch, cheapest first, then what may be faster, then larger batches.

    With the first policy that fits it tries `mesh.fsdp`, `model.attention` and `loss.gather`, and goes on with each
    that is faster. Where no policy fits, it tries `mesh.fsdp`.

    Args:
      config: where to start.
      shards: parts that the batch is cut into.
      ask: compiles a config; None, when it took too long, ends the search with what was found.
      slices: slices or nodes, which cut `data` alone.
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
    own = Levers(config.remat, config.model.attention, config.mesh.fsdp, config.loss.gather)
    fsdp = _other_fsdp(config, shards // slices)

    def points():
        """The points to try next."""
        for remat in config_lib.REMAT_POLICIES:  # from least recomputation to least memory
            yield own._replace(remat=remat), start
            if tried[-1].answer.fits:
                break
        if not tried[-1].answer.fits and fsdp > own.fsdp:
            yield tried[-1].levers._replace(fsdp=fsdp), start
        elif tried[-1].answer.fits:
            if fsdp != own.fsdp:
                yield tried[-1].levers._replace(fsdp=fsdp), start
            other = "auto" if own.attention == "xla" else "xla"
            yield _best(tried, start).levers._replace(attention=other), start
            for gather in GATHERS:
                if own.gather > 1 or not _can_gather(config, shards, gather):
                    break
                yield _best(tried, start).levers._replace(gather=gather), start
                if _best(tried, start).levers.gather != gather:
                    break
        # The policy that needs least memory carries the largest batch, and the fewest columns at a time.
        best = _best(tried, start) or tried[-1]
        levers = best.levers._replace(remat=config_lib.REMAT_POLICIES[-1], gather=own.gather)
        while True:
            mine = [p for p in tried if p.levers == levers]
            fitting = max((p.images_per_chip for p in mine if p.answer.fits), default=0)
            failing = min((p.images_per_chip for p in mine if not p.answer.fits), default=math.inf)
            if failing - fitting <= step or any(p.answer.failed for p in mine):
                return
            images = _predict(mine, start, step, fitting, failing)
            while images > fitting and not _groups_fit(config, images, shards):
                images -= step
            if images <= fitting:
                return
            yield levers, images

    for levers, images in itertools.islice(points(), max_compiles):
        answer = ask(_changed(config, levers, images * shards))
        if answer is None:
            break
        tried.append(Point(levers, images, answer))
    fits = [p for p in tried if p.answer.fits]
    largest = max(fits, key=lambda p: p.images_per_chip, default=None)
    return Found(tried, _best(tried, start), largest)


def _changed(config: config_lib.Config, levers: Levers, batch_size: int) -> config_lib.Config:
    """The config with these values."""
    return dataclasses.replace(
        config,
        remat=levers.remat,
        batch_size=batch_size,
        model=dataclasses.replace(config.model, attention=levers.attention),
        mesh=dataclasses.replace(config.mesh, fsdp=levers.fsdp),
        loss=dataclasses.replace(config.loss, gather=levers.gather),
    )


def _best(tried: list[Point], images: int) -> Point | None:
    """Of the points with so many images a chip that fit, the fastest of those with the first remat policy."""
    fits = [p for p in tried if p.answer.fits and p.images_per_chip == images]
    fits = [p for p in fits if p.levers.remat == fits[0].levers.remat]
    return max(fits, key=lambda p: p.answer.images_per_second or 0, default=None)


def _other_fsdp(config: config_lib.Config, chips: int) -> int:
    """The `mesh.fsdp` to try against the config's on slices of so many chips; the config's where no other serves."""
    if config.mesh.data != -1:  # else data takes what fsdp leaves
        return config.mesh.fsdp
    if config.mesh.fsdp > 1:
        return 1
    model = config.model
    towers = [t for t in (model.image, model.text, model.decoder) if t is not None]
    divides = chips % FSDP == 0 and all(t.width % FSDP == 0 for t in towers)
    return FSDP if divides else 1


def _can_gather(config: config_lib.Config, shards: int, gather: int) -> bool:
    """Whether more than one group of so many neighbours remains for the ring."""
    group = (config.loss.group_size or config.batch_size) * shards // config.batch_size
    return shards > gather and shards % gather == 0 and (group <= 1 or group % gather == 0)


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
