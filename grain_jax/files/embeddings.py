"""A folder of embeddings, as `grain-jax embed` writes it and `grain-jax search` reads it.

    DIR/settings.json                     what the embeddings are made of
    DIR/data/part-00000-of-00012.parquet  a row an image; whole, or not there
    DIR/faults.jsonl                      a line for each image that was left out
    DIR/README.md                         the data card

The columns are in docs/embed.md. pyarrow is imported where a file is read or written.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from grain_jax import errors

SETTINGS, DATA, FAULTS, CARD = "settings.json", "data", "faults.jsonl", "README.md"
STORED = ("float32", "float16")  # types of the embeddings in the files
IMAGE_EMBED, REGION_EMBED, BOXES = "image_embed", "region_embed", "boxes_xyxy"
_NOTE = b"grain_jax"  # key of a file's own metadata


class EmbeddingsError(errors.UserError):
    """A folder of embeddings cannot be read or written; the message is one line."""


class Part(NamedTuple):
    """What a Parquet file says of itself, without its rows."""

    name: str  # of the file
    rows: int
    most_regions: int  # of one image
    source: dict[str, Any]  # the piece of the source that it is made of, as plain values
    faults: list[dict[str, str]]  # of images that were left out: path, cause, detail


def pyarrow() -> Any:
    """The package pyarrow, with `parquet`. Raises EmbeddingsError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise EmbeddingsError(
            f"Parquet files need {error.name}, which is not installed; to get it: pip install 'grain_jax[embed]'"
        ) from None
    return pyarrow


def file_name(index: int, count: int) -> str:
    """The name of file number `index` of `count`."""
    return f"part-{index:05d}-of-{count:05d}.parquet"


def file_count(name: str) -> int:
    """How many files there are beside one of that name, itself included."""
    return int(name.removesuffix(".parquet").rpartition("-")[2])


def columns(dim: int, *, regions: bool, stored: str) -> Any:
    """The pyarrow schema of a file.

    Args:
      dim: D.
      regions: whether there are the columns of regions.
      stored: one of STORED.
    """
    pa = pyarrow()
    kind = pa.list_(pa.float16() if stored == "float16" else pa.float32(), dim)
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field(IMAGE_EMBED, kind, nullable=False),
    ]
    if regions:
        boxes = pa.list_(pa.float32(), 4)
        fields += [
            pa.field(REGION_EMBED, pa.list_(kind), nullable=False),
            pa.field(BOXES, pa.list_(boxes), nullable=False),
        ]
    return pa.schema(fields)


def note(part: Part) -> dict[bytes, bytes]:
    """The metadata of a Parquet file; `read_part` reads them."""
    said = {key: value for key, value in part._asdict().items() if key not in ("name", "rows")}
    return {_NOTE: json.dumps(said).encode()}


@contextlib.contextmanager
def open_file(path: epath.PathLike) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` at `path`, local or remote, as a context.

    Raises:
      EmbeddingsError: it is none, or cut off.
    """
    pa, path = pyarrow(), epath.Path(path)
    remote = "://" in str(path)
    with contextlib.ExitStack() as stack:
        try:
            source = str(path)
            if remote:
                source = _Seekable(stack.enter_context(path.open("rb")), path.stat().length)
            file = pa.parquet.ParquetFile(
                source,
                page_checksum_verification=True,
                pre_buffer=remote,  # reads a whole file ahead
            )
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None
        yield stack.enter_context(file)


class _Seekable(io.RawIOBase):
    """A file of an object store as pyarrow needs it; that of TensorFlow has no `closed`, and its `seek` returns None."""

    def __init__(self, file: Any, length: int):
        self._file, self._length, self._at = file, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def damaged(path: epath.PathLike, error: Exception) -> EmbeddingsError:
    """The error of a Parquet file that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return EmbeddingsError(
        f"{path}: damaged ({reason}); delete it and give the command grain-jax embed again, which makes it anew"
    )


def read_part(path: epath.PathLike) -> Part:
    """What a file says of itself; reads its footer alone.

    Raises:
      EmbeddingsError: it is no whole Parquet file, or none of grain-jax embed.
    """
    path = epath.Path(path)
    with open_file(path) as file:
        found = (file.metadata.metadata or {}).get(_NOTE)
        if found is None:
            raise EmbeddingsError(f"{path}: expected a file of grain-jax embed; move it elsewhere")
        return Part(name=path.name, rows=file.metadata.num_rows, **json.loads(found))


def read_settings(folder: epath.PathLike) -> dict[str, Any]:
    """What the embeddings of a folder are made of.

    Raises:
      EmbeddingsError: the folder is none of grain-jax embed.
    """
    path = epath.Path(folder) / SETTINGS
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise EmbeddingsError(
            f"{folder}: got no {SETTINGS} there, expected a folder that grain-jax embed wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise EmbeddingsError(f"{path}: {error}, expected JSON of grain-jax embed") from None
    if not isinstance(found, dict) or "model" not in found:
        raise EmbeddingsError(f"{path}: expected JSON of grain-jax embed")
    return found
