"""Hostile folders of embeddings: a good one, ways to change it, and all that reads one without a model."""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grain_jax.data.embed import embeddings, output, parts
from grain_jax.data.embed import search as search_lib
from grain_jax.data.embed import search_command as page
from tests import embedded, record_sets

D, FILES, ROWS = 8, 3, 4
_SETTINGS = embedded.settings(FILES, D, digest="d")
NOTE = b"grain_jax"


def name(part: int) -> str:
    """The path of a part below the folder."""
    return f"data/{embeddings.file_name(part, FILES)}"


def _job(folder: pathlib.Path) -> output.Output:
    pieces = [
        {"reader": "annotations", "name": f"{i}-x", "size": ROWS, "file": "", "first_line": 1}
        | {"images": str(folder / "images"), "start": 0, "stop": 1, "lines": ROWS}
        for i in range(FILES)
    ]
    return output.Output(parts.absolute(folder), _SETTINGS, pieces)


def write(folder: pathlib.Path) -> pathlib.Path:
    """An index of FILES parts with ROWS images each, which have two regions; and the images."""
    job, rng = _job(folder), np.random.default_rng(0)
    output.agree(job.folder, _SETTINGS)
    job.finished()
    (folder / "images").mkdir()
    for part in range(FILES):
        writer = output.Writer(job, part)
        for i in range(ROWS * part, ROWS * (part + 1)):
            record_sets.picture(i, (8, 8)).save(folder / "images" / f"{i}.png")
            vectors = rng.standard_normal((3, D)).astype(np.float32)
            boxes = np.sort(rng.uniform(size=(2, 2, 2)), axis=1).reshape(2, 4).astype(np.float32)
            row = (f"id{i}", f"{i}.png", 8, 8, vectors[0], vectors[1:], boxes)
            writer.add(output.EmbeddedImage(*row))
        writer.close()
    return folder


def search(folder: pathlib.Path) -> tuple[list[Any], int]:
    """The hits of two queries by regions and by images, and the number of missing parts; the page of them, too."""
    index = search_lib.Index(folder)
    queries = np.random.default_rng(1).standard_normal((2, D)).astype(np.float32)
    out = []
    for by in ("images", *(["regions"] * index.has_regions)):
        for hits in search_lib.search(index, queries, top=FILES * ROWS, by=by):
            assert all(np.isfinite(hit.score) and hit.width > 0 for hit in hits)
            out.append([(hit.score, hit.id, hit.path, hit.boxes_xyxy.tolist()) for hit in hits])
            loaded = parts.read_again([(hit.source, hit.path) for hit in hits])
            show = lambda hit: str(getattr(loaded[hit.source["name"], hit.path], "detail", ""))
            text = page.render("x", [page.Question("a")], [hits], show, index.settings.checkpoint)
            assert "\x1b" not in text and "\u202e" not in text
    return out, index.missing


def resume(folder: pathlib.Path) -> int:
    """Goes on with the job as `grain-jax embed` does up to the model; the number of parts that are done."""
    job = _job(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        output.agree(job.folder, _SETTINGS)
        return len(job.finished())


@contextlib.contextmanager
def kept(folder: pathlib.Path) -> Iterator[None]:
    """After the block the index is as it was before."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        yield
    finally:
        for path in [folder / "settings.json", *(folder / "data").iterdir()]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        for path, content in before.items():
            path.write_bytes(content)


def in_settings(folder: pathlib.Path, change: Callable[[Any], Any]) -> None:
    """Settings of another content."""
    path = folder / "settings.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rewrite(
    folder: pathlib.Path,
    part: int,
    table: Callable[[Any], Any] = lambda table: table,
    note: Callable[[Any], Any] = lambda note: note,
    **options: Any,
) -> None:
    """A part written anew, well-formed, with another table, another note, or other options of the writer."""
    path = folder / name(part)
    said = json.loads(pq.read_metadata(path).metadata[NOTE])
    metadata = {NOTE: json.dumps(note(said)).encode()}
    options = {"compression": "none", "use_dictionary": False} | options
    changed = table(pq.read_table(path)).replace_schema_metadata(metadata)
    pq.write_table(changed, path, **options)


def column(key: str, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of a table: the column `key` becomes what `make` says of it."""

    def change(table):
        at = table.schema.get_field_index(key)
        array = make(table[key].combine_chunks())
        return table.set_column(at, pa.field(key, array.type, nullable=array.null_count > 0), array)

    return change


def vectors(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """A change of float [N, D] to vectors of any width."""

    def make(array):
        values = change(np.array(array.flatten()).reshape(len(array), -1))
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    return make


def lists(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """The same of lists of vectors."""
    return lambda x: pa.ListArray.from_arrays(x.offsets, vectors(change)(x.flatten()))


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """One number becomes `value`."""

    def change(x):
        x[1, 1] = value
        return x

    return change


def replaced(folder: pathlib.Path, path: str, how: str) -> None:
    """Something that is no regular file in place of one: "fifo", "folder", or the target of a link."""
    place = folder / path
    place.unlink()
    if how == "fifo":
        os.mkfifo(place)
    elif how == "folder":
        place.mkdir()
    else:
        place.symlink_to(how)


def footer(schema: list[bytes], rows: int = 0, groups: list[bytes] | None = None) -> bytes:
    """A Parquet file of a handmade footer (thrift's compact protocol) and nothing else."""
    lists = (2, 9, _list(schema)), (4, 9, _list(groups or []))
    content = _struct([(1, 5, _int(2)), lists[0], (3, 6, _int(rows)), lists[1]])
    return b"PAR1" + content + struct.pack("<I", len(content)) + b"PAR1"


def element(title: bytes, children: int | None = None) -> bytes:
    """A column of float, or a group of so many."""
    kind = [(1, 5, _int(4))] if children is None else []
    below = [] if children is None else [(5, 5, _int(children))]
    return _struct([*kind, (3, 5, _int(0)), (4, 8, _varint(len(title)) + title), *below])


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _int(n: int) -> bytes:
    return _varint(2 * n if n >= 0 else -2 * n - 1)


def _list(items: list[bytes]) -> bytes:
    return b"\xfc" + _varint(len(items)) + b"".join(items)


def _struct(fields: list[tuple[int, int, bytes]]) -> bytes:
    out, last = b"", 0
    for number, kind, content in fields:
        out, last = out + bytes([(number - last) << 4 | kind]) + content, number
    return out + b"\0"


def _pick(value: Any) -> Callable[[pathlib.Path, random.Random], None]:
    return lambda folder, rng: rewrite(folder, rng.randrange(FILES), value)


def _null(array: Any) -> Any:
    return pa.array([None, *array.to_pylist()[1:]], array.type)


# Changes of the columns of a part.
COLUMNS: dict[str, Callable[[Any], Any]] = {
    "half the width": column("image_embed", vectors(lambda x: x[:, : D // 2])),
    "twice the width": column("image_embed", vectors(lambda x: np.tile(x, 2))),
    "regions of half the width": column("region_embed", lists(lambda x: x[:, : D // 2])),
    "float64": column("image_embed", vectors(lambda x: x.astype(np.float64))),
    "lists of any length": column("image_embed", lambda x: pa.array(x.to_pylist(), pa.list_(pa.float32()))),
    "null": column("image_embed", _null),
    "null id": column("id", _null),
    "NaN": column("image_embed", vectors(with_value(np.nan))),
    "NaN in a region": column("region_embed", lists(with_value(np.nan))),
    "infinite": column("image_embed", vectors(with_value(-np.inf))),
    "a box outside": column("boxes_xyxy", lists(with_value(1.5))),
    "a box of NaN": column("boxes_xyxy", lists(with_value(np.nan))),
    "a box too few": column("boxes_xyxy", lambda x: pa.array([y[:1] for y in x.to_pylist()], x.type)),
    "no width": column("width", lambda x: pa.array([0] * len(x), pa.int32())),
    "a column less": lambda table: table.drop_columns(["boxes_xyxy"]),
    "a column more": lambda table: table.append_column("a", pa.array([0] * len(table))),
    "another order": lambda table: table.select(table.column_names[::-1]),
}  # fmt: skip


def change(folder: pathlib.Path, rng: random.Random, put: Callable[..., Any]) -> None:
    """Changes an index in one of many ways; `put(value, rng)` damages a JSON value."""
    part, other = rng.sample(range(FILES), 2)
    how = rng.randrange(8)
    if how == 0:
        in_settings(folder, lambda value: put(value, rng))
    elif how in (1, 2):
        rewrite(folder, part, note=lambda value: put(value, rng))
    elif how == 3:
        rewrite(folder, part, rng.choice(list(COLUMNS.values())))
    elif how == 4:
        (folder / name(part)).write_bytes((folder / name(other)).read_bytes())
    elif how == 5:
        path = rng.choice(["settings.json", name(part)])
        kinds = ["fifo", "folder", "/dev/zero", "nowhere", "/etc/passwd"]
        replaced(folder, path, rng.choice(kinds))
    elif how == 6:
        options = [{"compression": "zstd"}, {"use_dictionary": True}, {"row_group_size": 1}]
        rewrite(folder, part, **rng.choice([*options, {"data_page_version": "2.0"}]))
    else:
        count = rng.choice([0, 1, 3, 4000])
        columns = [_struct([(2, 6, _int(0))])] * rng.choice([0, count])
        group = _struct([(1, 9, _list(columns)), (3, 6, _int(count))])
        schema = [element(b"s", rng.choice([1, count])), *[element(b"g", 1)] * count, element(b"a")]
        rows = rng.choice([0, -1, 2**62])
        (folder / name(part)).write_bytes(footer(schema, rows, [group] * rng.choice([0, count])))
