"""A deterministic shuffle: the order of the training records is a function of (seed, lanes, step).

The shuffle has `input.lanes` independent streams, the lanes. Lane i has the shards i, i + lanes, ..., in
blocks of `input.shards_per_block` shards that are read whole. In each epoch (seed, epoch, lane) permutes the
blocks, and (seed, epoch, lane, block) the records of a block. The next epoch follows at once. A step gives
the position in the stream, and the position gives the block to open. So a checkpoint needs the step alone.

`Lane.block` is this rule for one dataset; `_lane_stream` in records.py reads the blocks. In a mixture a lane
has a stream for each dataset and takes records from them by weight (`MixedLane`).

Random numbers come from the integer hash below, so the order does not change with the versions of numpy and
TensorFlow.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from grain_jax.core import errors


class ShardFile(NamedTuple):
    """One file of the set."""

    path: str
    num_records: int
    digest: str = ""  # of its records (record_files.digest_of)


class ShardBlock(NamedTuple):
    """A block of a lane in one epoch."""

    shards: tuple[ShardFile, ...]
    permutation: np.ndarray  # int64 [n]: the record (counted over the shards) at each position
    first_position: int  # of the block in the stream of the lane


class Lane:
    """The endless stream of records of a lane.

    Args:
      index: of the lane, from 0.
      shards: the lane's.
      shards_per_block: shards per block; the last block may have fewer.
      seed: of the run.
    """

    def __init__(self, index: int, shards: Sequence[ShardFile], *, shards_per_block: int, seed: int):
        self.index = index
        self.seed = seed
        self.blocks = [
            tuple(shards[i : i + shards_per_block]) for i in range(0, len(shards), shards_per_block)
        ]
        self._lengths = np.array([sum(s.num_records for s in b) for b in self.blocks], np.int64)
        self.num_records = int(self._lengths.sum())
        self.draw_key = hash_key(seed, index)

    def ordinal(self, position: int) -> int:
        """The number of the block, counted over all epochs, that has the position of the stream."""
        epoch, rest = divmod(position, self.num_records)
        ends = np.cumsum(self._lengths[self._block_order(epoch)])
        return epoch * len(self.blocks) + int(np.searchsorted(ends, rest, side="right"))

    def block(self, ordinal: int) -> ShardBlock:
        """The block of the number, counted over all epochs."""
        epoch, number = divmod(ordinal, len(self.blocks))
        order = self._block_order(epoch)
        index = int(order[number])
        first = epoch * self.num_records + int(self._lengths[order[:number]].sum())
        key = hash_key(self.seed, epoch, self.index, index)
        return ShardBlock(self.blocks[index], permutation(key, int(self._lengths[index])), first)

    def _block_order(self, epoch: int) -> np.ndarray:
        return permutation(hash_key(self.seed, epoch, self.index), len(self.blocks))


class MixedLane:
    """The endless stream of a lane over several sets, each in its own order, mixed by weight.

    Among the first p records, floor(share * p + offset) are of the heaviest set. The next heaviest divides
    the rest in the same way, and so on, so the position in each set at p takes one division per set. Among n
    consecutive records a set has share * n. The error is below 1 record for two sets, below 2 for three sets,
    and below 1 + (1 + 1/2 + ... + 1/(k - 2)) for k sets. The offsets of a set are spread evenly over the
    lanes, each set starting at another lane, so that most of these errors cancel in a global batch.

    Args:
      streams: the stream of each set in this lane.
      weights: of the sets, more than 0; their sum does not matter.
      lanes: how many there are.
      seed: of the run.
    """

    def __init__(self, streams: Sequence[Lane], weights: Sequence[float], *, lanes: int, seed: int):
        self.streams = list(streams)
        self.index = self.streams[0].index
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
        self._splits = []
        left = sum(exact)
        # Python integers: they have no largest position.
        *heavier, self._last = sorted(range(len(exact)), key=lambda i: -exact[i])
        for i in heavier:
            share = exact[i] / left
            below = share.denominator * lanes
            key = hash_key(seed, len(exact), i)
            turn = int(permutation(key, lanes)[self.index])
            offset = int(key[0]) + turn * share.denominator
            self._splits.append((i, share.numerator * lanes, offset % below, below))
            left -= exact[i]

    def positions(self, position: int) -> list[int]:
        """The position in the stream of each set at the position of the lane."""
        positions = [0] * len(self.streams)
        left = position
        for i, above, offset, below in self._splits:
            positions[i] = (above * left + offset) // below
            left -= positions[i]
        positions[self._last] = left
        return positions

    def choices(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: the set of each record from `first` to `last`, `last` not included."""
        stands = np.array([self.positions(p) for p in range(first, last + 1)], np.int64)
        return np.diff(stands, axis=0).argmax(axis=1)


def make_lanes(
    shards: Sequence[ShardFile], *, name: str, lanes: int, shards_per_block: int, seed: int
) -> list[Lane]:
    """All lanes of the set `name`; the shards are dealt out one by one. Raises errors.UserError."""
    shards = [shard for shard in shards if shard.num_records]
    if len(shards) < lanes:
        raise errors.UserError(
            f"input.lanes: got {lanes}, expected at most {len(shards)}, the number of shards of"
            f" {name!r}; set input.lanes={len(shards)} or fewer, or rebuild with grain-jax build --num-shards"
            f" {lanes}"
        )
    return [Lane(i, shards[i::lanes], shards_per_block=shards_per_block, seed=seed) for i in range(lanes)]


def mix(lanes_of_sets: Sequence[Sequence[Lane]], weights: Sequence[float], *, seed: int) -> list[MixedLane]:
    """All lanes of a mixture, from the lanes of each of its sets, equally many."""
    lanes = len(lanes_of_sets[0])
    by_lane = zip(*lanes_of_sets, strict=True)
    return [MixedLane(streams, weights, lanes=lanes, seed=seed) for streams in by_lane]


def seed_of_set(seed: int, index: int) -> int:
    """The seed of a set of a mixture. The first has the seed of the run, as a set alone has."""
    return int(hash_key(seed, index)[0]) if index else seed


def _bits_of(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), uint64 -> uint64; the result depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*numbers: int) -> np.ndarray:
    """A hash uint64 [1] of integers, in this order."""
    key = np.full(1, len(numbers), np.uint64)
    for number in numbers:
        key = _bits_of(key ^ np.array([number % 2**64], np.uint64))
    return key


def permutation(key: np.ndarray, n: int) -> np.ndarray:
    """int64 [n]: the numbers below n, permuted by the key."""
    hashes = _bits_of(_bits_of(np.arange(n, dtype=np.uint64)) ^ key)
    return np.argsort(hashes, kind="stable")


def uniforms(key: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """float32 [n, count] in [0, 1), a function of the key and each position (int64 [n])."""
    of_position = _bits_of(_bits_of(np.asarray(positions).astype(np.uint64)) ^ key)
    hashes = _bits_of(of_position[:, None] ^ _bits_of(np.arange(count, dtype=np.uint64)))
    return (hashes >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
