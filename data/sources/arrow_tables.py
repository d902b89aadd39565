"""What Parquet files and folders of `datasets` share: the types of their columns, their labels' names, their images."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from grain_jax.core import image_bounds, printable, regular_file
from grain_jax.data.sources import base, columns, join, webdataset

ROWS = 16  # that are Python's values at a time
_MANY_BYTES = 64 << 20  # of so many rows; larger ones are read one by one
_OBJECT = 64  # bytes of a value of Python
_MAX_ROW = image_bounds.MAX_BYTES + _MANY_BYTES
_PNG = b"\x89PNG"
_NOTE = b"huggingface"  # the metadata in which `datasets` keeps the types of columns
_TEXT = ("string", "large_string", "string_view")
_WHOLE = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMBER = (*_WHOLE, "halffloat", "float", "double")
_BYTES = ("binary", "large_binary", "binary_view")
# Option -> the types that its column may have (of lists, of their items), and how they are called.
_KINDS = {
    "image": ((*_TEXT, *_BYTES), "texts (paths), bytes, or a struct of bytes and path"),
    "caption": (_TEXT, "texts"),
    "captions": (_TEXT, "lists of texts"),
    "boxes": (_NUMBER, "lists of four numbers a box"),
    "labels": ((*_TEXT, *_WHOLE), "lists of texts or whole numbers"),
    "descriptions": (_TEXT, "lists of texts"),
    "scores": (_NUMBER, "lists of numbers"),
    "id": ((*_TEXT, *_WHOLE), "texts or whole numbers"),
}
_DEPTHS = {"image": (0,), "caption": (0, 1), "captions": (1,), "boxes": (2,), "id": (0,)}


@dataclasses.dataclass(frozen=True)
class ArrowTables(columns.Columns):
    """A `base.Source` of tables of Arrow's types; a shard is a part of a file. A subclass reads its tables."""

    images_are_files: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False  # where the bytes of all stand in the table

    def tables(self, arguments: Mapping[str, Any], read: Sequence[str]) -> Iterator[Any]:
        """The record batches of a shard, of at most ROWS rows, with the columns `read`. Raises SourceError."""
        raise NotImplementedError

    def schema(self, arguments: Mapping[str, Any]) -> Any:
        """The pyarrow schema of the file of a shard. Raises SourceError."""
        raise NotImplementedError

    def checked(self, where: str, schema: Any) -> columns.Named:
        """The columns of a schema, of the types that they need. Raises SourceError."""
        named = self.named(where, schema.names)
        for name, paths in named.paths.items():
            for path in paths:
                depth, kind = _kind(schema, path)
                fits, expected = _fits(name, depth, kind, named.row_is_box)
                if not fits:
                    got = f"column {'.'.join(path)} (--option {name}) is {'list of ' * depth}{kind}"
                    got = printable.plain(got, 300)
                    raise base.SourceError(f"{where}: {got}, expected {expected}")
                if name == "labels" and kind in _WHOLE and not named.names:
                    named = named._replace(names=_names(schema, path, where))
        return named

    def read(self, shard: base.SourceShard) -> Iterator[base.Image | base.Fault]:
        """The images of the shard, from bytes in the table or from files below --images."""
        given = shard.arguments
        named = self.checked(given["file"], self.schema(given))
        self.check_labels(given["file"], named, given["label_text"])
        options = base.Options(given["images"], label_text=given["label_text"])
        seen: set[str] = set()
        for where, value, found in self.items(self._rows(given, named), named, options.described):
            yield _image(where, value, found, given, seen)._replace(where=where)

    def _rows(
        self, given: Mapping[str, Any], named: columns.Named
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = given["first_row"]
        for table in self.tables(given, named.columns):
            step = ROWS if _size(table) < _MANY_BYTES else 1
            for first in range(0, table.num_rows, step):
                part = table.slice(first, step)
                if step == 1 and (size := _size(part)) > _MAX_ROW:
                    got = f"got {size:,} bytes, expected at most {_MAX_ROW:,}"
                    raise base.SourceError(f"{given['file']}:row {number}: {got} of a row")
                for row in part.to_pylist():
                    yield f"{given['file']}:row {number}", row
                    number += 1


def shard(number: int, options: base.Options, **arguments: Any) -> base.SourceShard:
    """A shard with these arguments: `file`, `first_row`, and those of the source; another size, another name."""
    arguments |= {
        "images": str(options.images),
        "label_text": options.label_text,
    }
    content = json.dumps(arguments, sort_keys=True).encode()
    return base.SourceShard(base.shard_name(number, content), arguments)


def of_file(path: epath.Path, files: Sequence[epath.Path]) -> dict[str, Any]:
    """The arguments of a shard that its file has: where there are several, names of images begin with the file's."""
    same_name = [one.stem for one in files].count(path.stem) > 1
    name = f"{files.index(path):05d}-{path.stem}" if same_name else path.stem
    prefix = f"{name}/" if len(files) > 1 else ""
    return {"file": str(path), "prefix": prefix, "size": regular_file.length(path)}


def _size(table: Any) -> int:
    """Bytes of a record batch as Python's values, about: one without a byte in Arrow, in a list, is an object, too."""
    return table.nbytes + _OBJECT * sum(map(_values, table.columns))


def _values(array: Any) -> int:
    """How many values the lists of an array have, at all depths."""
    if hasattr(array.type, "value_field"):
        return len(array.flatten()) + _values(array.flatten())
    is_struct = str(array.type).startswith("struct<")
    return sum(map(_values, array.flatten())) if is_struct else 0


def _kind(schema: Any, path: Sequence[str]) -> tuple[int, str]:
    """(how deep in lists, the type in there) of the value at a path; of a dictionary, that of its values."""
    kind, depth = schema.field(path[0]).type, 0
    for part in (*path[1:], None):
        while hasattr(kind, "value_type"):  # a list or a dictionary
            depth, kind = depth + hasattr(kind, "value_field"), kind.value_type
        if part is not None:
            names = [field.name for field in kind] if str(kind).startswith("struct<") else []
            if part not in names:
                return depth, f"without the field {part}: {kind}"[:200]
            kind = kind.field(part).type
    return depth, str(kind)


def _fits(name: str, depth: int, kind: str, row_is_box: bool) -> tuple[bool, str]:
    kinds, expected = _KINDS[name]
    depths = _DEPTHS.get(name, (1,))
    if row_is_box and name in ("boxes", *columns.OF_REGIONS):
        depths, expected = (0,), f"{expected.removeprefix('lists of ')}, as boxes are four columns"
    is_image = name == "image" and re.match(
        r"struct<(.*, )?bytes: (large_)?binary(_view)?[,>]", kind
    )
    # A column without a value, or with empty lists alone.
    is_empty = name != "image" and kind == "null" and depth <= max(depths)
    return is_empty or (depth in depths and (kind in kinds or bool(is_image))), expected


def _names(schema: Any, path: Sequence[str], where: str) -> list[str]:
    """The names of labels that `datasets` wrote beside the table (`ClassLabel`). Raises SourceError: none."""
    content = (schema.metadata or {}).get(_NOTE, b"{}")
    found: Any = regular_file.from_json(content, dict[str, Any], where, "the note of datasets")
    for part in ("info", "features", *path, None):
        while isinstance(found, list) or (isinstance(found, dict) and "feature" in found):
            found = found["feature"] if isinstance(found, dict) else found[0] if found else None
        if part is not None:
            found = found.get(part) if isinstance(found, dict) else None
    names = found.get("names") if isinstance(found, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        got = f"column {'.'.join(path)} has numbers, and the file no names for them"
        raise base.SourceError(f"{where}: {got}; --option names=FILE, the name of a label a line")
    return names


def _image(
    where: str,
    value: Any,
    found: base.Entry | base.Fault,
    given: Mapping[str, Any],
    seen: set[str],
) -> base.Image | base.Fault:
    """The image of the row at `where`: `value` is its path, its bytes, or a dict of both; `seen` are the names."""
    if isinstance(found, base.Fault):
        return found
    path, encoded = value, None
    if isinstance(value, Mapping):
        path, encoded = value.get("path"), value.get("bytes")
    elif isinstance(value, bytes):
        path, encoded = None, value
    if encoded is None and not path:
        return base.Fault(where, "no picture", "got neither bytes nor a path, expected an image")
    if encoded is None:
        if not given["images"]:
            got = f"got the path {path[:200]!r} and no --images, expected the folder of the images"
            return base.Fault(where, "no such file", got)
        return join.load(found._replace(image=path), given["images"])
    if not isinstance(encoded, bytes) or not isinstance(path, str | None):
        return base.Fault(
            where, "bad annotation", "got an image of other types, expected bytes and a path"
        )
    row = int(where.rpartition(" ")[2])
    name = regular_file.inside(path) if path else ""
    if not name or name == "." or len(name) > webdataset.MAX_PATH:
        name = f"{row:09d}.{'png' if encoded.startswith(_PNG) else 'jpg'}"
    if name in seen or given["first_row"]:  # other shards of the file may have that name
        name = f"{row:09d}/{name}"
    seen.add(name)
    name = given["prefix"] + name
    if len(encoded) > image_bounds.MAX_BYTES:
        got = f"got {len(encoded):,} bytes, expected at most {image_bounds.MAX_BYTES:,}"
        return base.Fault(name, "too large", got)
    return join.join(found._replace(image=name), encoded)
