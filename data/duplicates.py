"""Finds duplicate images, within a set and across sets, by two fingerprints.

`exact` is a hash of the file and does not depend on its name. `near` is a difference hash of the pixels: in a
resized or newly compressed copy, at most NEAR_BITS of 64 bits differ. So sets may be stored at any size.
"""

import hashlib
import io

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.data.sources import base, tfds

FILE = "fingerprints.npy"  # beside a set's records: a row per image
NEAR_BITS = 3
_BANDS = 4  # of 16 bits each; if 3 bits differ, at least one band is equal
_TELLING = 8  # bits of either kind; flat images have fewer, and all look alike

Fingerprint = tuple[int, int]  # exact, near: 64 bits each


def fingerprint(encoded: bytes, image: PIL.Image.Image) -> Fingerprint:
    """The fingerprints of a file and of the image in it.

    `near` says of 8 x 8 points of the resized grey image whether each is darker than its right neighbour.
    """
    exact = hashlib.sha256(encoded).digest()[:8]
    grey = image.convert("RGB").convert("L")
    # The gap lets most pixels be averaged in blocks first: a quarter of the time.
    small = grey.resize((9, 8), PIL.Image.Resampling.BILINEAR, reducing_gap=3)
    pixels = np.asarray(small)
    near = np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes()
    return int.from_bytes(exact), int.from_bytes(near)


def of_set(folder: epath.PathLike) -> np.ndarray:
    """Fingerprints of the images of a set of grain-jax build, all splits: uint64 [N, 2].

    Raises SourceError: there is no such set, or the file is damaged.
    """
    file = tfds.directory(folder) / FILE
    try:
        content = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        return content.astype(np.uint64, casting="safe").reshape(-1, 2)
    except Exception as error:  # numpy's reader raises nearly anything
        expected = "expected fingerprints that grain-jax build wrote"
        raise base.SourceError(f"{file}: {error}, {expected}; build that set again") from None


def matches(fingerprints: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which images are known: bool [N] exactly, bool [N] nearly or exactly."""
    exact = np.isin(fingerprints[:, 0], known[:, 0])
    near = exact.copy()
    bits, known_bits = fingerprints[:, 1], known[:, 1]
    telling = (_count_bits(known_bits) >= _TELLING) & (_count_bits(known_bits) <= 64 - _TELLING)
    known_bits = known_bits[telling]
    for band in range(_BANDS):
        values, wanted = ((x >> np.uint64(16 * band)).astype(np.uint16) for x in (known_bits, bits))
        order = np.argsort(values, kind="stable")
        low, high = (np.searchsorted(values[order], wanted, side) for side in ("left", "right"))
        for row in np.nonzero(~near & (low < high))[0]:
            others = known_bits[order[low[row] : high[row]]]
            near[row] = (_count_bits(others ^ bits[row]) <= NEAR_BITS).any()
    return exact, near


def _count_bits(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(values.reshape(-1, 1).view(np.uint8), axis=1).sum(axis=1)
