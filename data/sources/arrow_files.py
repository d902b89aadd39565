"""Opens Parquet files that others wrote, and other files of Arrow, local or in an object store, by pyarrow."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from etils import epath

from grain_jax.core import printable, regular_file
from grain_jax.data.sources import base

MAX_FOOTER = 8 << 20  # bytes; read, it takes thirty times as much
_MAX_GROUPS = 1 << 12  # of rows; and columns, which pyarrow nests as deep as they say


def pyarrow() -> Any:
    """The package pyarrow, with `parquet`. Raises SourceError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise base.SourceError(
            f"Parquet files need {error.name}, which is not installed; to get it: pip install 'grain_jax[embed]'"
        ) from None
    return pyarrow


@contextlib.contextmanager
def open_parquet(path: epath.PathLike, advice: str) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` at `path` as a context; what fails inside is damage, too.

    Args:
      path: the file.
      advice: what to do about damage.

    Raises:
      SourceError: it is none, cut off, no regular file, or cannot be read.
    """
    pa, path = pyarrow(), epath.Path(path)
    remote = "://" in str(path)
    try:
        length = regular_file.length(path)
        if length is None:
            raise base.SourceError(
                f"{path}: got a folder, pipe or device, expected a Parquet file; move it elsewhere"
            )
        with contextlib.ExitStack() as stack:
            if remote:
                source = Seekable(stack.enter_context(path.open("rb")), length)
            else:
                source = stack.enter_context(pa.OSFile(str(path)))
            source.seek(max(0, length - 8))
            footer = int.from_bytes(source.read(4), "little")
            if footer > MAX_FOOTER:
                raise pa.ArrowInvalid(f"a footer of {footer:,} bytes")
            file = pa.parquet.ParquetFile(
                source,
                page_checksum_verification=True,
                pre_buffer=remote,  # reads a whole file ahead
                thrift_string_size_limit=MAX_FOOTER,
                thrift_container_size_limit=_MAX_GROUPS,
            )
            yield stack.enter_context(file)
    except (OSError, pa.ArrowException, UnicodeError) as error:
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise base.SourceError(
                f"{path}: {error.strerror}, expected a readable Parquet file"
            ) from None
        raise damaged(path, " ".join(str(error).split()), advice) from None


def damaged(path: epath.PathLike, reason: str, advice: str) -> base.SourceError:
    """The error of a Parquet file whose content is not what was written."""
    return base.SourceError(f"{path}: damaged ({printable.plain(reason, 200)}); {advice}")


class Seekable(io.RawIOBase):
    """A file of an object store as pyarrow needs it; TensorFlow's has no `closed`, and its `seek` returns None."""

    def __init__(self, file: Any, length: int):
        self._file, self._length, self._at = file, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
