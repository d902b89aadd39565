"""The files of `grain-jax embed`, in the layout that clip-retrieval and autofaiss read.

DIR/img_emb/img_emb_00.npy        float16 [images, D]
DIR/region_emb/region_emb_00.npy  float16 [regions of all images, D], image after image
DIR/metadata/metadata_00.parquet  a row per image, with the boxes of its regions
DIR/settings.json                 what the embeddings are made of
DIR/faults.jsonl                  a line for each image that was left out
DIR/README.md                     the data card

A part has one of each of the first three. Its metadata are written last: they mark it as done.
"""

import concurrent.futures
import io
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import __version__
from grain_jax.core import printable, regular_file
from grain_jax.data import job, sources
from grain_jax.data.sources import arrow_files

FAULTS, CARD = "faults.jsonl", "README.md"
_READ_AT_ONCE = 16  # parts
_NOTE = b"grain_jax"  # key of a Parquet file's own metadata


class Row(NamedTuple):
    """An image with its embeddings; without them and with its pixels before the model has run."""

    path: str
    caption: str  # the first that the source has
    id: str
    width: int
    height: int
    boxes_xyxy: np.ndarray  # float32 [R, 4] in [0, 1], of its regions
    pixels: np.ndarray | None = None  # uint8 [S, S, 3], as the model takes them
    image_embed: np.ndarray | None = None  # [D]
    region_embed: np.ndarray | None = None  # [R, D]; None: the model has no regions


class Part(NamedTuple):
    """What a part's files hold."""

    rows: int
    faults: list[dict[str, str]]  # of images that were left out: path, cause, detail


class Output(NamedTuple):
    """The folder of a job.

    Attributes:
      folder: where the files lie.
      settings: what the embeddings are made of.
      parts: the parts of the source, as `parts.find` gives them.
      images: folder that the paths of images start from, or "".
    """

    folder: job.Output
    settings: dict[str, Any]
    parts: list[sources.SourceShard]
    images: str = ""

    def path(self, kind: str, index: int) -> epath.Path:
        """A file of a part: of "img_emb", "region_emb" or "metadata"."""
        digits = len(str(len(self.parts)))  # all names have as many, so that they sort
        ending = "parquet" if kind == "metadata" else "npy"
        return self.folder.path(kind, f"{kind}_{index:0{digits}d}.{ending}")

    @property
    def arrays(self) -> list[str]:
        """The kinds of arrays that a part has."""
        return ["img_emb", "region_emb"] if self.settings["regions"] else ["img_emb"]

    def done(self) -> dict[int, Part]:
        """The parts that are done. A damaged one is named on stderr, to be made again."""

        def read(index: int) -> Part | None:
            path = self.path("metadata", index)
            try:
                return self._read(index) if path.exists() else None
            except (OSError, ValueError, LookupError, TypeError) as error:  # of pyarrow, too
                reason = printable.plain(" ".join(str(error).split()), 200)
                print(f"{path}: damaged ({reason}); its part is made again", file=sys.stderr)
                path.unlink()
                return None

        with concurrent.futures.ThreadPoolExecutor(_READ_AT_ONCE) as pool:  # for object stores
            parts = pool.map(read, range(len(self.parts)))
            return {index: part for index, part in enumerate(parts) if part}

    def _read(self, index: int) -> Part:
        """What a part's files hold, by their headers. Raises OSError, ValueError, ... if one is damaged or missing."""
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

    def write(self, index: int, rows: Sequence[Row], faults: list[dict[str, str]]) -> None:
        """Writes the files of a part, the metadata last."""
        pa = arrow_files.pyarrow()
        empty = np.zeros((0, self.settings["embed_dim"]), np.float16)
        vectors = {"img_emb": [row.image_embed[None] for row in rows]}
        columns = {name: [getattr(row, name) for row in rows] for name in Row._fields[1:5]}
        below = f"{self.images}/" if self.images else ""
        columns = {"image_path": [below + row.path for row in rows]} | columns
        kinds = [pa.string()] * 3 + [pa.int32()] * 2
        if self.settings["regions"]:
            vectors["region_emb"] = [row.region_embed for row in rows]
            columns["boxes_xyxy"] = [row.boxes_xyxy.tolist() for row in rows]
            kinds.append(pa.list_(pa.list_(pa.float32(), 4)))
        for kind, embeds in vectors.items():
            values = np.concatenate([empty, *embeds], dtype=np.float16, casting="same_kind")
            self.folder.put(
                _header(values.shape) + values.tobytes(), *self.path(kind, index).parts[-2:]
            )
        regions = sum(map(len, columns.get("boxes_xyxy", ())))
        note = json.dumps({"faults": faults, "regions": regions}).encode()
        fields = [pa.field(name, kind, nullable=False) for name, kind in zip(columns, kinds)]
        file = io.BytesIO()
        pa.parquet.write_table(pa.table(columns, schema=pa.schema(fields, {_NOTE: note})), file)
        self.folder.put(file.getvalue(), *self.path("metadata", index).parts[-2:])

    def finish(self, parts: Sequence[Part]) -> None:
        """Writes the list of faults and the data card of all parts."""
        faults = (
            {**fault, "file": self.path("metadata", index).name}
            for index, part in enumerate(parts)
            for fault in part.faults
        )
        self.folder.put_lines(faults, FAULTS)
        settings = self.settings | self.settings["source"]
        plain = {key: printable.plain(str(value), 300) for key, value in settings.items()}
        plain["params"] = self.settings["model"]["params"]
        plain["images"] = f"{sum(part.rows for part in parts):,}"
        plain["left_out"] = f"{sum(len(part.faults) for part in parts):,}"
        regions = _CARD_REGIONS.format(**plain) if self.settings["regions"] else ""
        self.folder.put(_CARD.format(**plain, version=__version__) + regions, CARD)


def _header(shape: tuple[int, ...]) -> bytes:
    """What stands in a .npy of float16 before its numbers."""
    file = io.BytesIO()
    header = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


_CARD = """\
# Embeddings of {images} images

Written by `grain-jax embed` (grain_jax {version}) in the layout of clip-retrieval. {left_out} images were left out;
`faults.jsonl` names each with its cause. Vectors have unit length, so a dot product with the embedding of a text by the
same model is their cosine.

* source: `{path}` ({kind}), image list {image_list}
* model: `{checkpoint}`, digest of its parameters {params}, activations {dtype}
* images: resized to {image_size} x {image_size} pixels without keeping their aspect ratio
* `img_emb/img_emb_*.npy`: float16 [images, {embed_dim}]
* `metadata/metadata_*.parquet`: a row per image with `image_path`, `caption`, `id`, `width`, `height`
"""
_CARD_REGIONS = """\
* `region_emb/region_emb_*.npy`: float16 [regions, {embed_dim}] of all images, image after image
* column `boxes_xyxy` of the metadata: their boxes x1, y1, x2, y2 as shares of width and height, 0 to 1
"""
