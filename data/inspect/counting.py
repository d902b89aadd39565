"""Counters of bounded memory over a stream: numbers, distinct items, frequent items, a sample, padding of rows.

`Distinct` and `Frequent` are exact up to a limit; beyond it, their counts are estimates with a stated error. `Distinct`
and `Sample` select by the hashes of items, not at random.
"""

import collections
import hashlib
import heapq
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from grain_jax.core import patches
from grain_jax.input_pipeline import derived, image_shapes, text_lengths

DISTINCT_LIMIT = 250_000  # distinct items held in memory, about 50 MB
FREQUENT_LIMIT = 50_000
GROUPS = (1, 8, 16, 32, 64, 128)
MAX_REGIONS = 5  # input.max_regions
ROW_LENGTH = 77  # tokens of a row in CLIP; training cuts longer texts
MANY_BARS = 60  # bars that a histogram has at most
PATCH = 16  # pixels
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXAMPLES = 5  # of copies
_OCTAVE = 1000  # steps of a ratio of 2


def digest(content: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Numbers:
    """Exact statistics of integers: a count for each value. For lengths and sizes, which have few values."""

    def __init__(self):
        self.counts: collections.Counter[int] = collections.Counter()

    def add(self, values: Iterable[int]) -> None:
        """Counts the values."""
        self.counts.update(map(int, values))

    def above(self, limit: int) -> int:
        """How many exceed `limit`."""
        return sum(n for value, n in self.counts.items() if value > limit)

    def result(self) -> dict[str, Any]:
        """count, mean, min, median, p95, p99, max; and `histogram`, [[from, to, count], ...]."""
        if not self.counts:
            return {"count": 0, "histogram": []}
        values, counts = np.array(sorted(self.counts.items())).T
        shares = dict(median=0.5, p95=0.95, p99=0.99)
        ends, total = np.cumsum(counts), int(counts.sum())
        quantiles = {k: int(values[np.searchsorted(ends, x * total)]) for k, x in shares.items()}
        # A few very large values would leave all others in one bar, so they share the last bar.
        low, most = int(values[0]), int(values[-1])
        high = min(most, 2 * quantiles["p99"])
        width = -(-(high - low + 1) // MANY_BARS)
        place = (values - low) // width
        usual = place <= (high - low) // width
        bars = np.bincount(place[usual], weights=counts[usual]).astype(int).tolist()
        histogram = [[low + i * width, low + (i + 1) * width - 1, n] for i, n in enumerate(bars)]
        if not usual.all():
            histogram.append([histogram[-1][1] + 1, most, int(counts[~usual].sum())])
        mean = float((values * counts).sum() / total)
        extremes = {"count": total, "mean": mean, "min": low, **quantiles, "max": most}
        return {**extremes, "histogram": histogram}


class Distinct:
    """Counts the distinct items of a stream, and the copies of earlier items.

    Beyond `limit` distinct items, only those whose hash ends in k zero bits are held, with all their
    copies, and the counts are 2^k times those of the held items (Wegman's adaptive sampling, in
    Flajolet, "On adaptive sampling", 1990).
    """

    def __init__(self, limit: int = DISTINCT_LIMIT):
        self.limit, self.zero_bits, self.total = limit, 0, 0
        self.examples: list[list[str]] = []  # places of an item and of its copy
        self.held: dict[int, list] = {}  # hash -> [count, place of the first]

    def add(self, content: bytes, where: str) -> None:
        """Counts an item; `where` is its place or name."""
        self.total += 1
        key = digest(content)
        if key & (2**self.zero_bits - 1):
            return
        held = self.held.setdefault(key, [0, where])
        held[0] += 1
        if held[0] == 2 and len(self.examples) < _EXAMPLES:
            self.examples.append([held[1], where])
        while len(self.held) > self.limit:
            self.zero_bits += 1
            mask = 2**self.zero_bits - 1
            self.held = {key: held for key, held in self.held.items() if not key & mask}

    def result(self) -> dict[str, Any]:
        """total, distinct, copies (of earlier items), exact, and examples of copies."""
        scale = 2**self.zero_bits
        copies = min(self.total, scale * sum(times - 1 for times, _ in self.held.values()))
        out = {"total": self.total, "distinct": scale * len(self.held), "copies": copies}
        return {**out, "exact": self.zero_bits == 0, "examples": self.examples}


class Frequent:
    """The most frequent items. Beyond `limit` distinct ones, counts are too low by at most `too_low_by`.

    The summary of Misra and Gries ("Finding repeated elements", 1982), shrunk in batches.
    """

    def __init__(self, limit: int = FREQUENT_LIMIT):
        self.limit, self.too_low_by = limit, 0
        self.counts: collections.Counter = collections.Counter()

    def add(self, things: Iterable[Hashable]) -> None:
        """Counts the items."""
        self.counts.update(things)
        if len(self.counts) > 2 * self.limit:
            less = sorted(self.counts.values(), reverse=True)[self.limit]
            self.too_low_by += less
            kept = {thing: n - less for thing, n in self.counts.items() if n > less}
            self.counts = collections.Counter(kept)

    def top(self, number: int) -> list[list]:
        """The `number` most frequent items as [item, count]; equal counts are in the order of the names."""
        best = heapq.nsmallest(number, self.counts.items(), key=lambda kv: (-kv[1], str(kv[0])))
        return list(map(list, best))


class Sample:
    """A sample of `size` items, chosen by the hash of their names, which does not depend on their order."""

    def __init__(self, size: int):
        self.size, self._added = size, 0
        self._heap: list[
            tuple[int, int, Any]
        ] = []  # (-hash, -number, item): the largest hash is first

    def add(self, name: str, thing: Any) -> None:
        """Offers an item to the sample."""
        self._added += 1
        heapq.heappush(self._heap, (-digest(name.encode()), -self._added, thing))
        if len(self._heap) > self.size:
            heapq.heappop(self._heap)

    def things(self) -> list[Any]:
        """The items of the sample, in the order in which they were added."""
        return [thing for _, _, thing in sorted(self._heap, key=lambda entry: -entry[1])]


class Shapes:
    """Aspect ratios of images, and the padding that they leave in their own shape at each of `patches.LENGTHS`."""

    def __init__(self):
        self.count = self.long = 0
        self._ratios: collections.Counter[int] = collections.Counter()  # log2 of width / height
        self._real = dict.fromkeys(patches.LENGTHS, 0)

    def add(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Counts images, by width and height in pixels."""
        width, height = (side := np.array(list(sizes), np.int64).reshape(-1, 2)).T
        self.count += len(side)
        if len(side):
            self.long += round(image_shapes.share_of_long(side) * len(side))
        self._ratios.update(np.rint(_OCTAVE * np.log2(width / height)).astype(int).tolist())
        for length in self._real:
            rows, columns = patches.grid(height, width, PATCH, length)
            self._real[length] += int((rows * columns).sum())

    def result(self) -> dict[str, Any]:
        """count; `ratios`, quantile -> width / height; `long`, the share of images longer than `image_shapes.LONG`;
        `padding`, patches an image -> share of them that is no image, for patches of PATCH pixels."""
        if not self.count:
            return {"count": 0}
        values, counts = np.array(sorted(self._ratios.items())).T
        ends = np.cumsum(counts)
        at = {q: values[np.searchsorted(ends, q * self.count)] for q in QUANTILES}
        return {
            "count": self.count,
            "ratios": {f"{q:.0%}": round(float(2 ** (x / _OCTAVE)), 2) for q, x in at.items()},
            "long": self.long / self.count,
            "padding": {
                str(length): 1 - real / (length * self.count) for length, real in self._real.items()
            },
        }


class Padding:
    """Packs the caption and best regions of the images of a sample in groups of images, in shuffled order."""

    def __init__(self):
        self.images = 0
        self._sample = Sample(text_lengths.IMAGES)

    def add(self, caption_tokens: int, description_tokens: list[int]) -> None:
        """Adds the lengths of the texts of an image that training uses, 2..ROW_LENGTH tokens each; no caption: 0."""
        self.images += 1
        lengths = np.zeros(1 + MAX_REGIONS, np.int32)
        lengths[: 1 + len(description_tokens)] = caption_tokens, *description_tokens
        self._sample.add(str(self.images), lengths)

    def result(self) -> dict[str, Any]:
        """`unpacked` (padding of one text a row), and for each group size: groups tried, rows, padding, overflowing.

        `unpacked` and `padding` are shares of the places for tokens; `overflowing` is that of the texts that do not
        fit into the rows, at most `derived.MISFITS`.
        """
        found, length = self._sample.things(), ROW_LENGTH
        if not found:
            return {"row_length": length, "unpacked": None, "groups": []}
        lengths = np.stack(found)[np.random.default_rng(0).permutation(len(found))]
        groups = []
        for group in (group for group in GROUPS if group <= len(found)):
            whole = lengths[: len(found) // group * group]
            texts = dict(
                caption_lengths=whole[:, :1],
                description_lengths=whole[:, 1:],
                region_mask=whole[:, 1:] > 0,
                region_scores=np.zeros((len(whole), MAX_REGIONS), np.float32),
            )
            rows, misfits = derived.smallest_rows([texts], group, length, derived.MISFITS)
            tried = len(whole) // group
            padding = float(1 - whole.sum() / (tried * rows * length))
            told = dict(group=group, groups=tried, rows=rows, padding=padding)
            groups.append({**told, "overflowing": misfits})
        unpacked = float(1 - lengths.sum(axis=1).mean() / ((1 + MAX_REGIONS) * length))
        return {"row_length": length, "unpacked": unpacked, "groups": groups}
