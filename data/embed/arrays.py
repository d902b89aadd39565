"""The arrays of `grain-jax embed --format npy`, in the layout that clip-retrieval and autofaiss read.

DIR/img_emb/img_emb_00.npy        [images, D]
DIR/region_emb/region_emb_00.npy  [regions of all images, D], image after image
DIR/text_emb/text_emb_00.npy      [texts of all images, D], image after image
DIR/metadata/metadata_00.parquet  a row an image, with the boxes of its regions; written last
"""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from grain_jax.core import regular_file

METADATA = "metadata"
_FOLDERS = ("img_emb", "region_emb", "text_emb")


def number(index: int, count: int) -> str:
    """Number `index` of `count` files as it stands in their names: all have as many digits, so that they sort."""
    return f"{index:0{len(str(count))}d}"


def paths(
    folder: epath.Path, index: int, count: int, *, regions: bool, texts: bool
) -> list[epath.Path]:
    """The file of the images and, with `regions` and `texts`, those of the regions and the texts."""
    there = zip(_FOLDERS, (True, regions, texts))
    names = [name for name, is_there in there if is_there]
    return [folder / name / f"{name}_{number(index, count)}.npy" for name in names]


def encoded(blocks: Sequence[np.ndarray], dim: int, store: str) -> bytes:
    """A .npy of the rows of all blocks [N, dim], which are in C order and of the type `store`."""
    return b"".join([_header(sum(map(len, blocks)), dim, store), *(block.data for block in blocks)])


def stranger(folder: epath.Path, count: int, **there: bool) -> epath.Path | None:
    """A .npy beside those of `count` parts that is of none of them, or None; a reader would take its rows as well."""
    own = {path for index in range(count) for path in paths(folder, index, count, **there)}
    found = (path for name in _FOLDERS for path in sorted((folder / name).glob("*.npy")))
    return next((path for path in found if path not in own), None)


def fault(path: epath.Path, rows: int, dim: int, store: str) -> str | None:
    """Why a file is no whole .npy [rows, dim] of the type `store`, or None; reads its header alone.

    Raises:
      regular_file.FileError: it cannot be read.
    """
    header, name = _header(rows, dim, store), f"{path.parent.name}/{path.name}"
    expected = len(header) + rows * dim * np.dtype(store).itemsize
    if not path.exists():
        return f"{name} is not there"
    with regular_file.opened(path, "an array of grain-jax embed") as (file, length):
        if length != expected:
            return f"{name} has {length} bytes, expected {expected}"
        if file.read(len(header)) != header:
            return f"{name} has another header than {store} [{rows}, {dim}]"
    return None


def mapped(path: epath.Path, rows: int, dim: int, store: str) -> np.ndarray:
    """The array [rows, dim] of a .npy that has no `fault`, mapped into memory; of an object store it is read."""
    start = len(_header(rows, dim, store))
    if not rows:
        return np.zeros((0, dim), store)
    if regular_file.is_remote(path):
        content = regular_file.read(path, 1 << 40, "an array of grain-jax embed")
        return np.frombuffer(content, store, offset=start).reshape(rows, dim)
    return np.memmap(path, store, mode="r", offset=start, shape=(rows, dim))


def _header(rows: int, dim: int, store: str) -> bytes:
    file = io.BytesIO()
    said = {"descr": np.dtype(store).str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(file, said)
    return file.getvalue()
