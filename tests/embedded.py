"""Small folders of embeddings for tests: by a stand-in for the model, and what reads them."""

import functools
import tarfile

import numpy as np
import pyarrow.parquet

from grain_jax.core import images
from grain_jax.data.embed import embeddings, output, parts, pipeline


def read(folder):
    """The rows of a folder, by file and in order."""
    files = sorted((folder / "data").glob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def write_tars(images, folder):
    """The images in two tars; the second has the images of the sub-folder."""
    folder.mkdir()
    for name, paths in (("b", images.glob("*.png")), ("a", (images / "sub").glob("*.png"))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for path in sorted(paths):
                if not path.name.startswith("."):
                    tar.add(path, path.name)


def stand_in(batch):
    """A model whose vector is an image's first pixel; images have 2 or 3 regions."""
    first = np.stack([ready.pixels[0, 0] for ready in batch]).astype(np.float32)
    regions = [np.tile(row, (2 + int(row[0]) % 2, 1)) for row in first]
    boxes = [np.full((len(r), 4), 0.5, np.float32) for r in regions]
    return [
        output.EmbeddedImage(*ready[:4], *rest)
        for ready, *rest in zip(batch, first, regions, boxes)
    ]


def settings(files=1, dim=3, regions="queries", digest="", **more):
    """Settings of a folder of so many files."""
    source = embeddings.Source("folder", "", "", "", digest)
    values = dict(checkpoint="stand-in", model=embeddings.Digests("", ""), embed_dim=dim)
    values |= dict(regions=regions, image_size=8, dtype="float32", store="float32", shard_size=4)
    values |= dict(orientation="file", source=source, parts=files)
    return embeddings.Settings(**values | more)


def piece(name, size):
    """A piece of a source."""
    tar = {"tar": "a.tar", "prefix": "a", "orientation": "file"}
    return {"reader": "webdataset", "name": name, "size": size, **tar}


def job_of(source, folder, shard_size=4):
    folder = parts.absolute(folder)
    found = parts.find(str(source), images=None, split="", shard_size=shard_size, scratch=folder)
    made_of = settings(len(found.parts), digest=found.source.digest)
    output.agree(folder, made_of)
    return output.Output(folder, made_of, found.parts)


def go(job, mine=None, encode=stand_in, most_faults=float("inf")):
    before = job.finished()
    if mine is None:
        mine = [index for index in range(len(job.parts)) if index not in before]
    return pipeline.run(
        job,
        mine,
        encode,
        resize=functools.partial(images.resize, size=8),
        threads=2,
        label="test",
        known=True,
        before=list(before.values()),
        most_faults=most_faults,
    )
