"""The files of `grain-jax embed`: settings that may not change, a Parquet file a part, faults, the data card.

A part is written when it is whole, so that its presence marks it as done. What it left out stands in the file itself.
"""

import collections
import io
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from etils import epath

from grain_jax import __version__
from grain_jax.core import atomic, printable, regular_file
from grain_jax.data.embed import arrays, embeddings
from grain_jax.data.embed.embeddings import EmbeddingsError

_ROWS = 1024  # of a row group, which is held in memory


class EmbeddedImage(NamedTuple):
    """An image as it is written."""

    id: str
    path: str
    width: int
    height: int
    image_embed: np.ndarray  # [D]
    region_embed: np.ndarray | None  # [R, D]; None: the model finds no regions
    boxes_xyxy: np.ndarray | None  # [R, 4] in [0, 1]
    caption: str = ""  # the first that the source has
    text_digests: Sequence[int] = ()  # `embeddings.text_digest` of its texts
    text_embed: np.ndarray | None = None  # [T, D]; None: texts are not embedded


class Output(NamedTuple):
    """The folder of a job."""

    folder: epath.Path
    settings: embeddings.Settings
    parts: list[dict[str, Any]]  # of the source

    def name(self, index: int) -> str:
        """The file of a part."""
        return self.settings.file_name(index)

    def finished(self) -> dict[int, embeddings.Part]:
        """The parts that are done. A damaged file is named on stderr and deleted, to be made again.

        Raises:
          errors.UserError: a file is of no part: of another model, of other images, or none of grain-jax embed.
        """
        count = len(self.parts)
        if self.settings.format == "npy":
            if other := arrays.stranger(self.folder, count, **self.settings.arrays):
                message = "expected arrays of this job alone; move it elsewhere"
                raise EmbeddingsError(f"{other}: {message}")
        names = {self.name(index): index for index in range(count)}
        (self.folder / self.settings.data).mkdir(parents=True, exist_ok=True)
        done = {}
        for path, part in embeddings.read_parts(self.folder, self.settings):
            if isinstance(part, embeddings.DamagedError):
                print(f"{part}; it is made again now", file=sys.stderr)
                path.unlink()
                continue
            index = names[part.name]
            expected = self.parts[index]
            if any(part.source[key] != expected[key] for key in ("reader", "name", "size")):
                raise EmbeddingsError(
                    f"{path}: was made of other images: got {part.source['name']!r}, expected"
                    f" {expected['name']!r}; delete it, and give the same command again"
                )
            done[index] = part
        return done

    def write_faults(self, parts: Sequence[embeddings.Part]) -> None:
        """Replaces the file of faults by those of `parts`."""
        lines = [{**fault, "file": part.name} for part in parts for fault in part.faults]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        atomic.write_text(self.folder / embeddings.FAULTS, text)


def agree(folder: epath.Path, settings: embeddings.Settings) -> None:
    """Notes what the embeddings are made of. Raises UserError where the folder was begun with something else."""
    path = folder / embeddings.SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, msgspec.json.format(msgspec.json.encode(settings), indent=1))
        return
    if difference := embeddings.read_settings(folder).difference(settings):
        what = "{} {}, got {}".format(*difference)
        raise EmbeddingsError(
            f"--output {folder}: was begun with {what}; give another --output, or delete this one"
        )


class Writer:
    """The files of a part, in memory, as its rows come; `close` puts them in place, the Parquet file last."""

    def __init__(self, output: Output, index: int):
        self._pa = embeddings.pyarrow()
        self._output, self._index = output, index
        self._schema = embeddings.columns(output.settings)
        self._rows: list[EmbeddedImage] = []
        self._written = self._most = self._regions = self._texts = 0
        # Of the format npy: the columns that are arrays.
        self._blocks = collections.defaultdict[str, list[np.ndarray]](list)
        self.faults: list[dict[str, str]] = []
        self._file = io.BytesIO()
        self._parquet = self._pa.parquet.ParquetWriter(
            self._file,
            self._schema,
            compression="none",  # floats of embeddings cannot be compressed
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def add(self, row: EmbeddedImage) -> None:
        """Adds an image."""
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def close(self) -> embeddings.Part:
        """Ends the files and puts them in place. Raises EmbeddingsError."""
        self._flush()
        part = self.part()
        if self._output.settings.format == "npy":
            self._write_arrays()
        self._parquet.add_key_value_metadata(embeddings.note(part, self._output.settings))
        self._parquet.close()
        path = self._output.folder / self._output.settings.data / part.name
        atomic.write_bytes(path, self._file.getvalue())
        return part

    def _write_arrays(self) -> None:
        folder, settings, _ = self._output
        names = [embeddings.IMAGE_EMBED, *[embeddings.REGION_EMBED] * bool(settings.regions)]
        names += [embeddings.TEXT_EMBED] * settings.texts
        files = arrays.paths(folder, self._index, settings.parts, **settings.arrays)
        for path, name in zip(files, names, strict=True):
            path.parent.mkdir(exist_ok=True)
            if path.exists() and regular_file.length(path) is None:
                raise EmbeddingsError(f"{path}: got a folder, pipe or device; move it elsewhere")
            blocks = self._blocks.pop(name, [])  # let go of, before the next file is made
            atomic.write_bytes(path, arrays.encoded(blocks, settings.embed_dim, settings.store))

    def part(self) -> embeddings.Part:
        """What the file says of itself, by what has been written."""
        return embeddings.Part(
            name=self._output.name(self._index),
            rows=self._written,
            most_regions=self._most,
            source=dict(self._output.parts[self._index]),
            faults=self.faults,
            regions=self._regions,
            texts=self._texts,
        )

    def _flush(self) -> None:
        if not self._rows:
            return
        pa, rows, schema = self._pa, self._rows, self._schema
        settings = self._output.settings
        of_embeds = {embeddings.IMAGE_EMBED: np.stack([row.image_embed for row in rows])}
        counts = [len(row.boxes_xyxy) for row in rows] if settings.regions else []
        texts = [len(row.text_digests) for row in rows] if settings.texts else []
        lists = dict.fromkeys((embeddings.REGION_EMBED, embeddings.BOXES), counts)
        lists = {name: of for name, of in [*lists.items(), (embeddings.TEXT_EMBED, texts)] if of}
        for name in lists:
            of_embeds[name] = np.concatenate([getattr(row, name) for row in rows])
        columns = []
        for field in schema:
            if field.name not in of_embeds:
                values = [_plain(row, field.name, settings) for row in rows]
                columns.append(pa.array(values, field.type))
                continue
            values, is_list = of_embeds.pop(field.name), field.name != embeddings.IMAGE_EMBED
            vectors = _vectors(pa, values, field.type.value_type if is_list else field.type)
            if is_list:
                offsets = pa.array(np.cumsum([0, *lists[field.name]]).astype(np.int32))
                vectors = pa.ListArray.from_arrays(offsets, vectors, type=field.type)
            columns.append(vectors)
        for name, values in of_embeds.items():  # no columns: arrays beside the file
            self._blocks[name].append(np.ascontiguousarray(values, settings.store))
        self._parquet.write_table(pa.Table.from_arrays(columns, schema=schema))
        self._most, self._regions = max(self._most, *counts, 0), self._regions + sum(counts)
        self._texts += sum(texts)
        self._written += len(rows)
        self._rows = []


def _plain(row: EmbeddedImage, name: str, settings: embeddings.Settings) -> Any:
    """The value of a column without vectors; `image_path` is the file, where each image has one."""
    if name != "image_path":
        return getattr(row, name)
    folder = settings.source.images
    return f"{folder}/{row.path}" if folder else row.path


def _vectors(pa: Any, values: np.ndarray, kind: Any) -> Any:
    """[N, D] as a pyarrow array of `kind`, a fixed-size list."""
    # Not `to_pandas_dtype`, which needs pandas.
    store = {"halffloat": np.float16, "float": np.float32}[str(kind.value_type)]
    stored = values.astype(store, copy=False)
    flat = pa.array(np.ascontiguousarray(stored).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


_REGIONS = """\
| `region_embed` | list of `{stored}[{dim}]` | embeddings of its regions, unit length |
| `boxes_xyxy` | list of `float[4]` | their boxes x1, y1, x2, y2, as shares of width and height, 0 to 1 |
"""
_COLUMNS = """\
| column | type | what |
|---|---|---|
| `id` | string | the id of the annotations or the record; else the path |
| `path` | string | of the image below the source; of a tar `TAR/MEMBER`, of a record set its split and number |
| `width`, `height` | int32 | pixels of the image |
| `image_embed` | `{stored}[{dim}]` | embedding of the whole image, unit length |
"""
_ARRAYS = """\
| file | what |
|---|---|
| `img_emb/img_emb_*.npy` | {stored} [images, {dim}], embeddings of the whole images, unit length |
| `metadata/metadata_*.parquet` | a row an image: `image_path`, `caption`, `id`, `width`, `height` |
"""
_REGION_ARRAYS = """\
| `region_emb/region_emb_*.npy` | {stored} [regions, {dim}], of all images, image after image |
| column `boxes_xyxy` of the metadata | their boxes x1, y1, x2, y2, as shares of width and height, 0 to 1 |
"""
_TEXTS = """\
| `text_embed` | list of `{stored}[{dim}]` | embeddings of its captions and descriptions, unit length |
| `text_digests` | list of `int64` | BLAKE2b of each text, 8 bytes, little-endian, without white space at its ends |
"""
_TEXT_ARRAYS = """\
| `text_emb/text_emb_*.npy` | {stored} [texts, {dim}], captions and descriptions of all images, image after image |
| column `text_digests` of the metadata | BLAKE2b of each text, 8 bytes, little-endian, without white space at its ends |
"""
_READ = """\
import pathlib

import pyarrow.dataset

files = sorted(pathlib.Path("data").glob("*.parquet"))
for batch in pyarrow.dataset.dataset(files).to_batches(columns=["id", "image_embed"]):
    image_embed = batch["image_embed"].flatten().to_numpy(zero_copy_only=False).reshape(-1, {dim})
"""
_READ_ARRAYS = """\
import pathlib

image_embed = np.concatenate([np.load(x) for x in sorted(pathlib.Path("img_emb").glob("*.npy"))])
"""


def card(settings: embeddings.Settings, parts: Sequence[embeddings.Part], folder: str) -> str:
    """The card, in Markdown.

    Args:
      settings: what they are made of.
      parts: all of them.
      folder: as it was given.
    """
    rows, faults = sum(p.rows for p in parts), sum(len(p.faults) for p in parts)
    source = settings.source
    plain = lambda value: printable.plain(str(value), 300)
    tables, read, search = (_COLUMNS, _REGIONS, _TEXTS), _READ, ""
    if settings.format == "npy":
        tables, read = (_ARRAYS, _REGION_ARRAYS, _TEXT_ARRAYS), _READ_ARRAYS
    else:
        search = f':\n`grain-jax search {plain(folder)} --text "a long orange beak"`'
    there = (True, bool(settings.regions), settings.texts)
    table = "".join(x for x, is_there in zip(tables, there) if is_there)
    table, read = (x.format(stored=settings.store, dim=settings.embed_dim) for x in (table, read))
    split = f", split {plain(source.split)}" if source.split else ""
    size = f"{settings.image_size} pixels a side, resized without keeping the aspect ratio"
    if settings.sequence_length:
        size = f"at most {settings.sequence_length} patches, resized with the aspect ratio kept"
    return f"""---
configs:
- config_name: default
  data_files: {settings.data}/*.parquet
---
# Embeddings of {rows:,} images

Written by `grain-jax embed` (grain_jax {__version__}, jax {jax.__version__}). {len(parts):,} Parquet files
in `{settings.data}/`; {faults:,} images were left out, and `faults.jsonl` names each with its cause.

| | |
|---|---|
| source | `{plain(source.path)}` ({source.kind}{split}), digest {source.digest} |
| model | `{plain(settings.checkpoint)}`, digest of its parameters {settings.model.params} |
| image size | {size} |
| orientation | {settings.orientation} (exif: as a viewer shows the image; file: as its pixels are stored) |
| activations | {settings.dtype} |

{table}
```python
import numpy as np
{read}```

A dot product with the embedding of a text by the same model is their cosine{search}.
"""
