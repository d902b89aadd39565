"""The files of `grain-jax embed`, in the layout that clip-retrieval and autofaiss read.

DIR/img_emb/img_emb_00.npy        float16 [images, D]
DIR/region_emb/region_emb_00.npy  float16 [regions of all images, D], image after image
DIR/metadata/metadata_00.parquet  a row per image, with the boxes of its regions
DIR/settings.json                 what the embeddings are made of
DIR/faults.jsonl                  a line for each image that was left out

A part has one of each of the first three. DIR/done/done_00.record, written last, has their digests.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax.data import job, sources
from grain_jax.data.sources import arrow_tables


class Row(NamedTuple):
    """An image with its embeddings; without them and with its pixels before the model has run."""

    path: str
    caption: str  # the first that the source has
    id: str
    width: int
    height: int
    pixels: np.ndarray | None  # uint8 [S, S, 3], as the model takes them
    image_embed: np.ndarray | None = None  # [D]
    boxes_xyxy: np.ndarray | None = None  # [R, 4] in [0, 1]; None: the model has no regions
    region_embed: np.ndarray | None = None  # [R, D]


class Part(NamedTuple):
    """What a part's files hold."""

    rows: int
    faults: list[dict[str, str]]  # of images that were left out: path, cause, detail
    digests: dict[str, str]  # of each file, by its name below the folder


class Embeddings(NamedTuple):
    """The folder of a job: `settings` are what the embeddings are made of, `parts` the shards of the source.

    The paths of images start from the folder `images`, or "".
    """

    folder: job.Output
    settings: dict[str, Any]
    parts: list[sources.SourceShard]
    images: str = ""

    def path(self, kind: str, index: int) -> epath.Path:
        """A file of a part: of "img_emb", "region_emb", "metadata" or "done"."""
        digits = len(str(len(self.parts)))  # all names have as many, so that they sort
        ending = {"metadata": "parquet", "done": "record"}.get(kind, "npy")
        return self.folder.path(kind, f"{kind}_{index:0{digits}d}.{ending}")

    def done(self, check: bool = True) -> dict[int, Part]:
        """The parts that are done; `check` as for `job.Output.whole`."""
        names = ((index, self.path("done", index).name) for index in range(len(self.parts)))
        records = ((index, self.folder.whole("done", name, check=check)) for index, name in names)
        return {index: Part(**record) for index, record in records if record}

    def write(self, index: int, rows: Sequence[Row], faults: list[dict[str, str]]) -> None:
        """Writes the files of a part, and then the record that marks it as done."""
        pa = arrow_tables.pyarrow()
        below = f"{self.images}/" if self.images else ""
        columns: dict[str, list] = {"image_path": [below + row.path for row in rows]}
        columns |= {name: [getattr(row, name) for row in rows] for name in Row._fields[1:5]}
        kinds = [pa.string()] * 3 + [pa.int32()] * 2
        arrays = {"img_emb": [row.image_embed[None] for row in rows]}
        if self.settings["regions"]:
            arrays["region_emb"] = [row.region_embed for row in rows]
            columns["boxes_xyxy"] = [row.boxes_xyxy.tolist() for row in rows]
            kinds.append(pa.list_(pa.list_(pa.float32(), 4)))
        contents = {}
        for kind, embeds in arrays.items():
            embeds = [np.zeros((0, self.settings["embed_dim"]), np.float16), *embeds]
            file = io.BytesIO()
            np.save(file, np.concatenate(embeds, dtype=np.float16, casting="same_kind"))
            contents[kind] = file.getvalue()
        fields = [pa.field(name, kind, nullable=False) for name, kind in zip(columns, kinds)]
        file = io.BytesIO()
        pa.parquet.write_table(pa.table(columns, schema=pa.schema(fields)), file)
        contents["metadata"] = file.getvalue()
        names = {kind: (kind, self.path(kind, index).name) for kind in (*contents, "done")}
        digests = {"/".join(names[x]): self.folder.put(y, *names[x]) for x, y in contents.items()}
        self.folder.put_record(Part(len(rows), faults, digests)._asdict(), *names["done"])
