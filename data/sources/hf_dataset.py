"""A folder that `datasets` saved (`save_to_disk`); the options that name the columns: `data/sources/columns.py`.

--annotations is the folder, of a Dataset, or of a DatasetDict, whose split is --split (default: train). The column of
the image holds what the feature Image does, or paths below --images. A shard is a file of the folder.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from etils import epath

from grain_jax.core import printable, regular_file
from grain_jax.data.sources import arrow_files, arrow_tables, base, columns

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_EXPECTED = "a folder that datasets saved with save_to_disk"
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class _DataFile(msgspec.Struct):
    filename: _Name


class _State(msgspec.Struct):
    data_files: Annotated[list[_DataFile], msgspec.Meta(max_length=100_000)] = msgspec.field(
        name="_data_files"
    )


class _Splits(msgspec.Struct):
    splits: Annotated[list[_Name], msgspec.Meta(max_length=1000)]


@dataclasses.dataclass(frozen=True)
class HfDataset(arrow_tables.ArrowTables):
    """Images of the rows of a saved Dataset."""

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """One for each Arrow file of the split."""
        folder = _folder(options)
        state = regular_file.read_json(folder / _STATE, _State, _EXPECTED)
        where = str(folder / _STATE)
        files = [regular_file.below(folder, one.filename, where) for one in state.data_files]
        out = []
        for path in files:
            with _opened(path) as reader:
                named = self.checked(str(path), reader.schema)
                if path == files[0]:
                    columns.warn_of_boxes(path, reader.schema.names, named)
            if named.row_is_box and len(files) > 1:
                raise base.SourceError(f"{folder}: a box a row in several files, expected one file")
            given = arrow_tables.of_file(path, files)
            out.append(arrow_tables.shard(len(out), options, first_row=0, **given))
        return out

    def schema(self, arguments: Mapping[str, Any]) -> Any:
        with _opened(arguments["file"]) as reader:
            return reader.schema

    def tables(self, arguments: Mapping[str, Any], read: Sequence[str]) -> Iterator[Any]:
        with _opened(arguments["file"]) as reader:
            for batch in reader:
                batch = batch.select([*read])
                batch.validate(full=True)  # offsets of a damaged one lead anywhere
                for first in range(0, batch.num_rows, arrow_tables.ROWS):
                    yield batch.slice(first, arrow_tables.ROWS)


def _folder(options: base.Options) -> epath.Path:
    """The folder of the split. Raises SourceError, regular_file.FileError."""
    if len(options.annotations) != 1:
        raise base.SourceError(f"got no --annotations, or several, expected {_EXPECTED}")
    folder = epath.Path(options.annotations[0])
    if (folder / _SPLITS).exists():
        known = regular_file.read_json(folder / _SPLITS, _Splits, _EXPECTED).splits
        split = options.split or "train"
        base.check_split(folder / _SPLITS, split, known)
        return regular_file.below(folder, split, str(folder / _SPLITS))
    if options.split:
        raise base.SourceError(
            f"{folder}: got --split {options.split}, but it has one split, expected none"
        )
    return folder


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[Any]:
    """The `pyarrow.RecordBatchStreamReader` of a file; what fails inside is damage. Raises SourceError, FileError."""
    pa = arrow_files.pyarrow()
    with contextlib.ExitStack() as stack:
        # A map of a local file gives no more bytes than there are, whatever a message claims.
        file, size = stack.enter_context(regular_file.opened(path, _EXPECTED))
        source = arrow_files.Seekable(file, size)
        if not regular_file.is_remote(path):
            source = stack.enter_context(pa.memory_map(str(path)))
        try:
            yield stack.enter_context(pa.ipc.open_stream(source))
        except (OSError, pa.ArrowException, UnicodeError, MemoryError) as error:
            reason = printable.plain(" ".join(str(error).split()), 200)
            raise base.SourceError(
                f"{path}: damaged ({reason}), expected {_EXPECTED}; save it again"
            ) from None
