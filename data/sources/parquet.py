"""Parquet files, those of a data set on the Hub too; the options that name the columns: `data/sources/columns.py`.

The column of the image holds paths below --images, or bytes, or the Hub's struct of both. --annotations are the files,
or a folder of them. Numbers as labels have their names in the file, as `datasets` writes them, or in `names=FILE`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax.data.sources import arrow_files, arrow_tables, base, columns

_ADVICE = "fetch it again, or write it again in fewer groups of rows"


@dataclasses.dataclass(frozen=True)
class Parquet(arrow_tables.ArrowTables):
    """Images of the rows of Parquet files; a shard is some groups of rows of a file."""

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """Groups of rows that follow each other, with at least `options.shard_size` rows."""
        files = _files(options)
        out = []
        for path in files:
            with arrow_files.open_parquet(path, _ADVICE) as file:
                named, told = self.checked(str(path), file.schema_arrow), file.metadata
                if path == files[0]:
                    columns.warn_of_boxes(path, file.schema_arrow.names, named)
                if named.row_is_box and len(files) > 1:
                    raise base.SourceError(
                        f"{path}: a box a row in several files, expected one file"
                    )
                rows = [told.row_group(i).num_rows for i in range(told.num_row_groups)]
            arguments = arrow_tables.of_file(path, files)
            first, groups = 0, []
            for group in range(len(rows)):
                groups.append(group)
                taken = sum(rows[i] for i in groups)
                # Rows of an image may lie in two groups.
                full = taken >= options.shard_size and not named.row_is_box
                if full or group == len(rows) - 1:
                    given = arguments | {"groups": groups, "first_row": first, "rows": taken}
                    out.append(arrow_tables.shard(len(out), options, **given))
                    first, groups = first + taken, []
        return out

    def schema(self, arguments: Mapping[str, Any]) -> Any:
        with arrow_files.open_parquet(arguments["file"], _ADVICE) as file:
            return file.schema_arrow

    def tables(self, arguments: Mapping[str, Any], read: Sequence[str]) -> Iterator[Any]:
        with arrow_files.open_parquet(arguments["file"], _ADVICE) as file:
            told = file.metadata
            for group in arguments["groups"]:
                # pyarrow ends the process where a group has more.
                if (
                    group >= told.num_row_groups
                    or told.row_group(group).num_columns != told.num_columns
                ):
                    raise arrow_files.damaged(arguments["file"], "other groups of rows", _ADVICE)
            try:
                for batch in file.iter_batches(arrow_tables.ROWS, arguments["groups"], [*read]):
                    batch.validate(full=True)  # texts that are no UTF-8
                    yield batch
            except MemoryError as error:
                raise arrow_files.damaged(arguments["file"], str(error), _ADVICE) from None


def _files(options: base.Options) -> list[epath.Path]:
    """The files that --annotations names; of a folder, its Parquet files. Raises SourceError: there is none."""
    if not options.annotations:
        raise base.SourceError("got no --annotations, expected Parquet files, or a folder of them")
    found = []
    for path in map(epath.Path, options.annotations):
        inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if options.split:  # the Hub's files are called train-00000-of-00008.parquet
            begins = (f"{options.split}-", f"{options.split}.")
            inside = [one for one in inside if path.is_dir() and one.name.startswith(begins)]
        if not inside:
            of_split = f" of --split {options.split}" if options.split else ""
            raise base.SourceError(f"{path}: got no .parquet file{of_split} there, expected some")
        found += inside
    return found
