"""The files of `grain-jax embed`, in the layout that clip-retrieval and autofaiss read.

DIR/img_emb/img_emb_00.npy        float16 [images, D]
DIR/region_emb/region_emb_00.npy  float16 [regions of all images, D], image after image
DIR/metadata/metadata_00.parquet  a row per image, with the boxes of its regions
DIR/settings.json                 what the embeddings are made of
DIR/faults.jsonl                  a line for each image that was left out
DIR/README.md                     the data card

A part has one of each of the first three. Its metadata are written last, so that their presence marks it as done.
"""

import concurrent.futures
import io
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from grain_jax import __version__
from grain_jax.core import atomic, errors, printable, regular_file
from grain_jax.data.sources import arrow_files

SETTINGS, FAULTS, CARD = "settings.json", "faults.jsonl", "README.md"
_READ_AT_ONCE = 16  # parts
_NOTE = b"grain_jax"  # key of a Parquet file's own metadata


class EmbedError(errors.UserError):
    """The embeddings cannot be made or written; the message is one line."""


class EmbeddedImage(NamedTuple):
    """An image as it is written."""

    path: str
    caption: str  # the first that the source has
    id: str
    width: int
    height: int
    image_embed: np.ndarray  # [D]
    region_embed: np.ndarray | None  # [R, D]; None: there are no regions
    boxes_xyxy: np.ndarray | None  # [R, 4] in [0, 1]


class Part(NamedTuple):
    """What a part's files hold."""

    rows: int
    faults: list[dict[str, str]]  # of images that were left out: path, cause, detail


class Output(NamedTuple):
    """The folder of a job.

    Attributes:
      settings: what the embeddings are made of.
      parts: the parts of the source, as `parts.find` gives them.
      images: folder that the paths of images start from, or "".
    """

    folder: epath.Path
    settings: dict[str, Any]
    parts: list[dict[str, Any]]
    images: str = ""

    def path(self, kind: str, index: int) -> epath.Path:
        """A file of a part: of "img_emb", "region_emb" or "metadata"."""
        digits = len(str(len(self.parts)))  # all names have as many, so that they sort
        ending = "parquet" if kind == "metadata" else "npy"
        return self.folder / kind / f"{kind}_{index:0{digits}d}.{ending}"

    @property
    def arrays(self) -> list[str]:
        """The kinds of arrays that a part has."""
        return ["img_emb", "region_emb"] if self.settings["regions"] else ["img_emb"]

    def finished(self) -> dict[int, Part]:
        """The parts that are done. A damaged one is named on stderr, to be made again."""

        def read(index: int) -> Part | None:
            path = self.path("metadata", index)
            if not path.exists():
                return None
            try:
                return self._read(index)
            except (OSError, ValueError, LookupError, TypeError) as error:  # of pyarrow, too
                reason = printable.plain(" ".join(str(error).split()), 200)
                print(f"{path}: damaged ({reason}); its part is made again", file=sys.stderr)
                path.unlink()
                return None

        with concurrent.futures.ThreadPoolExecutor(_READ_AT_ONCE) as pool:  # for object stores
            parts = pool.map(read, range(len(self.parts)))
            return {index: part for index, part in enumerate(parts) if part}

    def _read(self, index: int) -> Part:
        """What a part's files hold, by their headers. Raises OSError, ValueError, ...: one is damaged, or missing."""
        pa = arrow_files.pyarrow()
        with self.path("metadata", index).open("rb") as file:
            metadata = pa.parquet.read_metadata(pa.BufferReader(file.read()))
        note = json.loads(metadata.metadata[_NOTE])
        for kind, rows in zip(self.arrays, (metadata.num_rows, note["regions"])):
            path = self.path(kind, index)
            header = _header((rows, self.settings["embed_dim"]))
            length = len(header) + 2 * rows * self.settings["embed_dim"]
            with path.open("rb") as file:
                if regular_file.length(path) != length or file.read(len(header)) != header:
                    raise ValueError(f"{path.name} is no whole array of {rows} rows")
        return Part(metadata.num_rows, note["faults"])

    def write(
        self, index: int, rows: Sequence[EmbeddedImage], faults: list[dict[str, str]]
    ) -> Part:
        """Writes the files of a part, the metadata last."""
        pa = arrow_files.pyarrow()
        below = f"{self.images}/" if self.images else ""
        columns: dict[str, list] = {"image_path": [below + row.path for row in rows]}
        for name in ("caption", "id", "width", "height"):
            columns[name] = [getattr(row, name) for row in rows]
        kinds = [pa.string()] * 3 + [pa.int32()] * 2
        fields = [pa.field(name, kind, nullable=False) for name, kind in zip(columns, kinds)]
        regions = 0
        if self.settings["regions"]:
            columns["boxes_xyxy"] = [row.boxes_xyxy.tolist() for row in rows]
            regions = sum(map(len, columns["boxes_xyxy"]))
            box = pa.list_(pa.float32(), 4)
            fields.append(pa.field("boxes_xyxy", pa.list_(box), nullable=False))
        note = json.dumps({"faults": faults, "regions": regions})
        schema = pa.schema(fields, {_NOTE: note.encode()})
        for kind in self.arrays:
            vectors = [row.image_embed[None] for row in rows]
            if kind == "region_emb":
                vectors = [row.region_embed for row in rows]
            empty = np.zeros((0, self.settings["embed_dim"]), np.float16)
            values = np.concatenate([empty, *vectors], dtype=np.float16, casting="same_kind")
            self._put(self.path(kind, index), _header(values.shape) + values.tobytes())
        file = io.BytesIO()
        table = pa.table({field.name: columns[field.name] for field in schema}, schema=schema)
        pa.parquet.write_table(table, file)
        self._put(self.path("metadata", index), file.getvalue())
        return Part(len(rows), faults)

    def _put(self, path: epath.Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, content)

    def write_faults(self, parts: Sequence[Part]) -> None:
        """Replaces the file of faults; it lists the faults of all parts."""
        lines = [
            json.dumps({**fault, "file": self.path("metadata", index).name}) + "\n"
            for index, part in enumerate(parts)
            for fault in part.faults
        ]
        atomic.write_text(self.folder / FAULTS, "".join(lines))


def _header(shape: tuple[int, ...]) -> bytes:
    """What stands in a .npy of float16 before its numbers."""
    file = io.BytesIO()
    header = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def agree(folder: epath.Path, settings: dict[str, Any]) -> None:
    """Notes what the embeddings are made of. Raises UserError where the folder was begun with something else."""
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(settings, indent=1))
        return
    known = regular_file.read_json(path, dict[str, Any], "the settings of grain-jax embed")
    for key in settings:  # a model may lie elsewhere: its digests count
        if key != "checkpoint" and known.get(key) != settings[key]:
            got, expected = (json.dumps(x.get(key)) for x in (settings, known))
            raise EmbedError(
                f"--output {folder}: was begun with {key} {expected}, got {got}; give another --output, or delete"
                " this one"
            )


_CARD = """\
# Embeddings of {rows:,} images

Written by `grain-jax embed` (grain_jax {version}, jax {jax}) in the layout of clip-retrieval; {faults:,} images were left
out, and `faults.jsonl` names each with its cause.

| | |
|---|---|
| source | `{path}` ({kind}), digest {digest} |
| model | `{checkpoint}`, digest of its parameters {params} |
| image size | {image_size} pixels a side, resized without keeping the aspect ratio |
| activations | {dtype} |

| file | what |
|---|---|
| `img_emb/img_emb_*.npy` | float16 [images, {embed_dim}], embeddings of the whole images, unit length |
| `metadata/metadata_*.parquet` | a row per image: `image_path`, `caption`, `id`, `width`, `height` |
{regions}
```python
import pathlib

import numpy as np

image_embed = np.concatenate([np.load(x) for x in sorted(pathlib.Path("img_emb").glob("*.npy"))])
```

A dot product with the embedding of a text by the same model is their cosine.
"""
_CARD_REGIONS = """\
| `region_emb/region_emb_*.npy` | float16 [regions, {embed_dim}], of all images, image after image |
| column `boxes_xyxy` of the metadata | their boxes x1, y1, x2, y2, as shares of width and height, 0 to 1 |
"""


def card(settings: dict[str, Any], parts: Sequence[Part]) -> str:
    """The data card, in Markdown, of all parts."""
    plain = {
        key: printable.plain(str(value), 300)
        for key, value in {**settings, **settings["source"]}.items()
    }
    plain["regions"] = _CARD_REGIONS.format(**plain) if settings["regions"] else ""
    return _CARD.format(
        rows=sum(part.rows for part in parts),
        faults=sum(len(part.faults) for part in parts),
        version=__version__,
        jax=jax.__version__,
        params=settings["model"]["params"],
        **plain,
    )
