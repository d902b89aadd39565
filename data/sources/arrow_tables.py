"""Parquet files, also of a dataset on the Hub, and folders that `datasets` saved (`save_to_disk`).

The options name the columns (`data/sources/columns.py`). The column of the image holds paths below --images,
bytes, or the Hub's struct of both. Numbers as labels have their names in the file, as `datasets` writes them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from etils import epath

from grain_jax.core import printable, regular_file
from grain_jax.data.sources import base, columns, join

_ROWS = 16  # that become Python's values at a time


class _State(msgspec.Struct):
    data_files: list[dict[str, str]] = msgspec.field(name="_data_files")


def pyarrow() -> Any:
    """The package pyarrow, with `fs` and `parquet`. Raises SourceError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.fs
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise base.SourceError(
            f"Parquet files need {error.name}, which is not installed: pip install 'grain_jax[embed]'"
        ) from None
    return pyarrow


@dataclasses.dataclass(frozen=True)
class _Tables(columns.RowOptions):
    """A `base.Source` of tables of Arrow's types; a shard is a part of a file.

    A subclass has `_files(options)`, `_reader(open file)`, `_batches(reader, columns, arguments of a shard)`.
    """

    images_are_files: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False  # if the bytes of all stand in the table
    form: ClassVar[str] = ""  # of the files
    schema: ClassVar[str] = "schema"  # the reader's attribute

    def _groups(self, reader: Any, shard_size: int) -> list[dict[str, Any]]:
        """Parts of a file: the arguments of its shards, with the number of the first row."""
        return [{"first_row": 0}]

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        files, out = self._files(options), []
        stems = [path.stem for path in files]
        for index, path in enumerate(files):
            with self._opened(path) as reader:
                self.named(path, getattr(reader, self.schema).names, options)  # raises if one is missing
                parts = self._groups(reader, options.shard_size)
            # If there are several files, names of images begin with the file's.
            name = f"{index:05d}-{path.stem}" if stems.count(path.stem) > 1 else path.stem
            shared = {
                "file": str(path),
                "size": regular_file.length(path),  # another file, another name of the shard
                "prefix": f"{name}/" if len(files) > 1 else "",
                "images": str(options.images),
                "label_text": options.label_text,
            }
            for part in parts:
                content = json.dumps(shared | part, sort_keys=True).encode()
                out.append(base.SourceShard(base.shard_name(len(out), content), shared | part))
        return out

    @contextlib.contextmanager
    def _opened(self, path: epath.PathLike) -> Iterator[Any]:
        """What reads a file, local or in an object store. Raises SourceError: anything fails inside."""
        pa = pyarrow()
        try:
            if "://" in str(path):
                filesystem, name = pa.fs.FileSystem.from_uri(str(path))
                file = filesystem.open_input_file(name)
            else:  # a map of a file gives no more bytes than there are, whatever a message claims
                file = pa.memory_map(str(path))
            with file, self._reader(file) as reader:
                yield reader
        except (OSError, pa.ArrowException, UnicodeError, MemoryError) as error:
            reason = f"damaged ({printable.plain(' '.join(str(error).split()), 200)})"
            if isinstance(error, OSError) and error.errno is not None:
                reason = error.strerror
            raise base.SourceError(f"{path}: {reason}, expected {self.form}") from None

    def read(self, shard: base.SourceShard) -> Iterator[base.Annotation | base.Fault]:
        """The images of the shard, from bytes in the table or from files below --images."""
        arguments, seen = shard.arguments, set()
        options = base.Options(arguments["images"], label_text=arguments["label_text"])
        with self._opened(arguments["file"]) as reader:
            schema = getattr(reader, self.schema)
            named = self.named(arguments["file"], schema.names, options)
            if "labels" in named.paths:
                names = _label_names(schema, named.paths["labels"], arguments["file"])
                named = named._replace(names=names)
            read = list(dict.fromkeys(path[0] for path in named.paths.values()))
            first = arguments["first_row"]
            for batch in self._batches(reader, read, arguments):
                batch.validate(full=True)  # texts that are no UTF-8; offsets that lead anywhere
                for number, row in enumerate(batch.to_pylist(), first):
                    image, annotation = self.annotation(f"{arguments['file']}:row {number}", row, named)
                    fault = isinstance(annotation, base.Fault)
                    yield annotation if fault else _with_image(image, annotation, arguments, seen)
                first += batch.num_rows

    def first_row(self, shard: base.SourceShard) -> dict[str, Any]:
        """The values of the first row, by column; empty without a row."""
        with self._opened(shard.arguments["file"]) as reader:
            names = getattr(reader, self.schema).names
            batch = next(self._batches(reader, names, shard.arguments), None)
            rows = batch.slice(0, 1).to_pylist() if batch else []
        return rows[0] if rows else {}


class HfDataset(_Tables):
    """Images of the rows of a saved Dataset; a shard is a file of its folder.

    --annotations is the folder, of a Dataset, or of a DatasetDict, whose split is --split (default: train).
    """

    form = "a folder that datasets saved with save_to_disk"

    def _files(self, options: base.Options) -> list[epath.Path]:
        if len(options.annotations) != 1:
            raise base.SourceError(f"got no --annotations, or several, expected {self.form}")
        folder = epath.Path(options.annotations[0])
        splits, split = folder / "dataset_dict.json", options.split
        if splits.exists():
            known = regular_file.read_json(splits, dict[str, list[str]], self.form).get("splits", ())
            split = split or "train"
            base.check_split(splits, split, known)
            folder = regular_file.below(folder, split, str(splits))
        else:
            base.check_split(folder, split, ())
        where = str(folder / "state.json")
        state = regular_file.read_json(where, _State, self.form)
        return [regular_file.below(folder, x.get("filename", ""), where) for x in state.data_files]

    def _reader(self, file: Any) -> Any:
        return pyarrow().ipc.open_stream(file)

    def _batches(self, reader: Any, names: list[str], arguments: Mapping[str, Any]) -> Iterator:
        for batch in reader:
            for first in range(0, batch.num_rows, _ROWS):
                yield batch.select(names).slice(first, _ROWS)


class Parquet(_Tables):
    """Images of the rows of Parquet files; a shard is some groups of rows of a file.

    --annotations are the files, or a folder of them.
    """

    form = "a Parquet file; fetch it again, or write it again in fewer groups of rows"
    schema = "schema_arrow"

    def _files(self, options: base.Options) -> list[epath.Path]:
        if not options.annotations:
            raise base.SourceError("got no --annotations, expected Parquet files, or a folder")
        files = []
        for path in map(epath.Path, options.annotations):
            base.check_split(path, options.split, ())
            files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        return files

    def _reader(self, file: Any) -> Any:
        return pyarrow().parquet.ParquetFile(file, page_checksum_verification=True)

    def _groups(self, reader: Any, shard_size: int) -> list[dict[str, Any]]:
        """Groups of rows that follow each other, with at least `shard_size` rows."""
        parts, first = [], 0
        for group in range(reader.num_row_groups):
            if not parts or parts[-1]["rows"] >= shard_size:
                parts.append({"groups": [], "first_row": first, "rows": 0})
            rows = reader.metadata.row_group(group).num_rows
            parts[-1]["groups"].append(group)
            parts[-1]["rows"] += rows
            first += rows
        return parts

    def _batches(self, reader: Any, names: list[str], arguments: Mapping[str, Any]) -> Iterator:
        metadata, groups = reader.metadata, arguments["groups"]
        if max(groups) >= metadata.num_row_groups or any(
            metadata.row_group(group).num_columns != metadata.num_columns for group in groups
        ):  # pyarrow would end the process
            raise pyarrow().ArrowInvalid("other groups of rows")
        return reader.iter_batches(_ROWS, groups, names)


def _label_names(schema: Any, path: Sequence[str], where: str) -> list[str]:
    """The names of labels that `datasets` wrote beside the table (`ClassLabel`); none if it did not."""
    content = (schema.metadata or {}).get(b"huggingface", b"{}")
    value: Any = regular_file.from_json(content, dict[str, Any], where, "the note of datasets")
    for part in ("info", "features", *path, None):
        while isinstance(value, list) or (isinstance(value, dict) and "feature" in value):
            value = value["feature"] if isinstance(value, dict) else value[0] if value else None
        if part is not None:
            value = value.get(part) if isinstance(value, dict) else None
    names = value.get("names") if isinstance(value, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _with_image(
    image: Any, annotation: base.Annotation, arguments: Mapping[str, Any], seen: set[str]
) -> base.Annotation | base.Fault:
    """A row with its image: `image` is its path, its bytes, or a dict of both; `seen` are the names."""
    where = annotation.where
    if not isinstance(image, Mapping):
        image = {"bytes" if isinstance(image, bytes) else "path": image}
    path, encoded = image.get("path"), image.get("bytes")
    if not isinstance(encoded, bytes | None) or not isinstance(path, str | None) or not (encoded or path):
        return base.Fault(where, "no image", "expected the bytes of an image or its path", where)
    if encoded is None:
        if not arguments["images"]:
            got = f"got a path and no --images, expected the folder of {path:.200}"
            return base.Fault(where, "no such file", got, where)
        return join.load(annotation._replace(image=path), arguments["images"])
    row = int(where.rpartition(" ")[2])
    name = regular_file.inside(path or ".")
    if name in ("", ".") or len(name.encode()) > base.MAX_PART:
        name = f"{row:09d}.{'png' if encoded[1:4] == b'PNG' else 'jpg'}"
    if name in seen or arguments["first_row"]:  # other shards of the file may have that name
        name = f"{row:09d}/{name}"
    seen.add(name)
    return join.join(annotation._replace(image=arguments["prefix"] + name, encoded=encoded))
