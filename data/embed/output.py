"""The files of `grain-jax embed`: settings that may not change, a Parquet file a part, faults, the data card.

A part is written when it is whole, so that its presence marks it as done. What it left out stands in the file itself.
"""

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
from grain_jax.core import atomic, printable
from grain_jax.data.embed import embeddings
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


class Output(NamedTuple):
    """The folder of a job."""

    folder: epath.Path
    settings: embeddings.Settings
    parts: list[dict[str, Any]]  # of the source

    def name(self, index: int) -> str:
        """The file of a part."""
        return embeddings.file_name(index, len(self.parts))

    def finished(self) -> dict[int, embeddings.Part]:
        """The parts that are done. A damaged file is named on stderr and deleted, to be made again.

        Raises:
          errors.UserError: a file is of no part: of another model, of other images, or none of grain-jax embed.
        """
        names = {self.name(index): index for index in range(len(self.parts))}
        (self.folder / embeddings.DATA).mkdir(parents=True, exist_ok=True)
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
    """The Parquet file of a part, in memory, as its rows come; `close` puts it in place."""

    def __init__(self, output: Output, index: int):
        self._pa = embeddings.pyarrow()
        self._output, self._index = output, index
        self._schema = embeddings.columns(output.settings)
        self._rows: list[EmbeddedImage] = []
        self._written = self._most = 0
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
        """Ends the file and puts it in place."""
        self._flush()
        part = self.part()
        self._parquet.add_key_value_metadata(embeddings.note(part, self._output.settings))
        self._parquet.close()
        path = self._output.folder / embeddings.DATA / part.name
        atomic.write_bytes(path, self._file.getvalue())
        return part

    def part(self) -> embeddings.Part:
        """What the file says of itself, by what has been written."""
        return embeddings.Part(
            name=self._output.name(self._index),
            rows=self._written,
            most_regions=self._most,
            source=dict(self._output.parts[self._index]),
            faults=self.faults,
        )

    def _flush(self) -> None:
        if not self._rows:
            return
        pa, rows, schema = self._pa, self._rows, self._schema
        plain = list(zip(*rows))[:4]  # id, path, width, height
        columns = [pa.array(values, field.type) for values, field in zip(plain, schema)]
        image = np.stack([row.image_embed for row in rows])
        columns.append(_vectors(pa, image, schema.field(embeddings.IMAGE_EMBED).type))
        if embeddings.REGION_EMBED in schema.names:
            counts = [len(row.boxes_xyxy) for row in rows]
            offsets = pa.array(np.cumsum([0, *counts]).astype(np.int32))
            for name in (embeddings.REGION_EMBED, embeddings.BOXES):
                kind = schema.field(name).type
                values = np.concatenate([getattr(row, name) for row in rows])
                vectors = _vectors(pa, values, kind.value_type)
                columns.append(pa.ListArray.from_arrays(offsets, vectors, type=kind))
            self._most = max(self._most, *counts)
        self._parquet.write_table(pa.Table.from_arrays(columns, schema=schema))
        self._written += len(rows)
        self._rows = []


def _vectors(pa: Any, values: np.ndarray, kind: Any) -> Any:
    """[N, D] as a pyarrow array of `kind`, a fixed-size list."""
    stored = values.astype(kind.value_type.to_pandas_dtype(), copy=False)
    flat = pa.array(np.ascontiguousarray(stored).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


_REGIONS = """\
| `region_embed` | list of `{stored}[{dim}]` | embeddings of its regions, unit length |
| `boxes_xyxy` | list of `float[4]` | their boxes x1, y1, x2, y2, as shares of width and height, 0 to 1 |
"""


def card(settings: embeddings.Settings, parts: Sequence[embeddings.Part], folder: str) -> str:
    """The card, in Markdown.

    Args:
      settings: what they are made of.
      parts: all of them.
      folder: as it was given.
    """
    rows, faults = sum(p.rows for p in parts), sum(len(p.faults) for p in parts)
    stored, dim = settings.store, settings.embed_dim
    regions = _REGIONS.format(stored=stored, dim=dim) if settings.regions else ""
    source = settings.source
    plain = lambda value: printable.plain(str(value), 300)
    split = f", split {plain(source.split)}" if source.split else ""
    return f"""---
configs:
- config_name: default
  data_files: data/*.parquet
---
# Embeddings of {rows:,} images

Written by `grain-jax embed` (grain_jax {__version__}, jax {jax.__version__}). {len(parts):,} Parquet files
in `data/`; {faults:,} images were left out, and `faults.jsonl` names each with its cause.

| | |
|---|---|
| source | `{plain(source.path)}` ({source.kind}{split}), digest {source.digest} |
| model | `{plain(settings.checkpoint)}`, digest of its parameters {settings.model.params} |
| image size | {settings.image_size} pixels a side, resized without keeping the aspect ratio |
| orientation | {settings.orientation} (exif: as a viewer shows the image; file: as its pixels are stored) |
| activations | {settings.dtype} |

| column | type | what |
|---|---|---|
| `id` | string | the id of the annotations or the record; else the path |
| `path` | string | of the image below the source; of a tar `TAR/MEMBER`, of a record set its split and number |
| `width`, `height` | int32 | pixels of the image |
| `image_embed` | `{stored}[{dim}]` | embedding of the whole image, unit length |
{regions}
```python
import numpy as np
import pyarrow.dataset

for batch in pyarrow.dataset.dataset("data").to_batches(columns=["id", "image_embed"]):
    image_embed = batch["image_embed"].flatten().to_numpy(zero_copy_only=False).reshape(-1, {dim})
```

A dot product with the embedding of a text by the same model is their cosine:
`grain-jax search {plain(folder)} --text "a long orange beak"`.
"""
