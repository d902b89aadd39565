"""Finds duplicate images, within a set and across sets, by two fingerprints.

`exact` is a hash of the file and does not depend on its name. `near` is a difference hash of the pixels: in a copy that
was resized or compressed anew, at most NEAR_BITS of 64 bits differ. So both sets may be stored at any size.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import images
from grain_jax.data import parallel, sources
from grain_jax.data.sources import tfds

FILE = "fingerprints.npy"  # beside a set's records: a row per image
NEAR_BITS = 3
_BANDS = 4  # of 16 bits each; if 3 bits differ, at least one band is equal
_TELLING = 8  # bits of either kind; flat images have fewer, and all look alike
_PAIRS = 1 << 18  # compared at once

Fingerprint = tuple[int, int]  # exact, near: 64 bits each


def fingerprint(encoded: bytes, image: PIL.Image.Image) -> Fingerprint:
    """The fingerprints of a file and of the image in it.

    `near` has a bit for each of 8 x 8 points of the resized grey image. It says whether the point is darker than its
    right neighbour.
    """
    exact = hashlib.sha256(encoded).digest()[:8]
    grey = image.convert("RGB").convert("L")
    # The gap lets most pixels be averaged in blocks first: a quarter of the time.
    small = grey.resize((9, 8), PIL.Image.Resampling.BILINEAR, reducing_gap=3)
    pixels = np.asarray(small)
    near = np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes()
    return int.from_bytes(exact), int.from_bytes(near)


def table(values: list[int] | np.ndarray) -> np.ndarray:
    """Fingerprints one after another -> uint64 [N, 2]."""
    return np.asarray(values, np.uint64).reshape(-1, 2)


def encode(fingerprints: np.ndarray) -> bytes:
    """The content of FILE."""
    out = io.BytesIO()
    np.save(out, fingerprints)
    return out.getvalue()


def of_set(folder: epath.PathLike, *, workers: int) -> np.ndarray:
    """Fingerprints of the images of a TFDS set, all splits: uint64 [N, 2].

    Sets that grain-jax build wrote keep the fingerprints of their source files; images of other sets are decoded, which
    takes time.

    Raises:
      data.sources.SourceError: there is no set.
    """
    directory = tfds.directory(folder)
    if (file := directory / FILE).exists():
        try:
            return table(np.load(io.BytesIO(file.read_bytes()), allow_pickle=False))
        except Exception as error:  # numpy's reader raises nearly anything
            reason = f"{error}, expected fingerprints that grain-jax build wrote"
            raise sources.SourceError(f"{file}: {reason}; remove it, and images are read") from None
    of_shards = parallel.ordered_map(
        _of_shard, tfds.all_shards(directory), workers=workers, chunk=1
    )
    return table([value for values in of_shards for value in values])


def _of_shard(shard: sources.SourceShard) -> list[int]:
    """The fingerprints of a shard, without images that cannot be read."""
    values = []
    for item in sources.read(shard):
        with contextlib.suppress(images.ImageError):
            if isinstance(item, sources.Image):
                values += fingerprint(item.encoded, images.decode_image(item.encoded))
    return values


def earlier_twins(fingerprints: np.ndarray) -> np.ndarray:
    """Per image the index of the first image with the same file; -1 for that one itself. int64 [N]."""
    _, first, which = np.unique(fingerprints[:, 0], return_index=True, return_inverse=True)
    out = first[which]
    return np.where(out < np.arange(len(out)), out, -1)


def matches(fingerprints: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which images are known: bool [N] exactly, bool [N] nearly or exactly."""
    exact = np.isin(fingerprints[:, 0], known[:, 0])
    near = exact.copy()
    bits, known_bits = fingerprints[:, 1], known[:, 1]
    telling = (_count_bits(known_bits) >= _TELLING) & (_count_bits(known_bits) <= 64 - _TELLING)
    known_bits = known_bits[telling]
    for band in range(_BANDS):
        shift = np.uint64(16 * band)
        ordered = known_bits[np.argsort((known_bits >> shift) & np.uint64(0xFFFF), kind="stable")]
        values = (ordered >> shift) & np.uint64(0xFFFF)
        wanted = (bits >> shift) & np.uint64(0xFFFF)
        low, high = (np.searchsorted(values, wanted, side) for side in ("left", "right"))
        for rows, others in _pairs(low, np.where(near, low, high)):
            close = _count_bits(bits[rows] ^ ordered[others]) <= NEAR_BITS
            near[rows[close]] = True
    return exact, near


def _pairs(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a row and each index from low[row] to high[row], some at a time."""
    ends = np.cumsum(high - low)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _PAIRS):
        pairs = np.arange(start, min(start + _PAIRS, total))
        rows = np.searchsorted(ends, pairs, side="right")
        yield rows, high[rows] - (ends[rows] - pairs)


def _count_bits(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(values.reshape(-1, 1).view(np.uint8), axis=1).sum(axis=1)
