"""Writes examples with TFDS's own writer, so that TFDS (and whatever builds on it) reads the set.

Each split has its own number of shards, and the records of two builds have the same bytes.
"""

import contextlib
import dataclasses
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer
from tensorflow_datasets.core.utils import shard_utils

from grain_jax.input_pipeline import record_files, record_folders


def features(encoding_format: str | None, negatives: bool) -> tfds.features.FeaturesDict:
    """The record format; data/SCHEMA.md explains it. A set without negatives has no such feature."""
    of_region = {
        "bbox": tfds.features.BBoxFeature(),
        "description": tfds.features.Text(),
        "score": tfds.features.Scalar(np.float32),
    }
    if negatives:
        of_region["negatives"] = tfds.features.Sequence(tfds.features.Text())
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format=encoding_format),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "synthetic_caption": tfds.features.Text(),
            "regions": tfds.features.Sequence(of_region),
        }
    )


class _SortedFields(writer.ExampleWriter):
    """Sorts the fields of each record by name: protobuf's order differs between processes."""

    def write(self, path: epath.PathLike, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes a shard: (key, serialized example) of each record."""
        parsed = ((key, tf.train.Example.FromString(record)) for key, record in examples)
        written = ((key, item.SerializeToString(deterministic=True)) for key, item in parsed)
        return super().write(path, written)


@dataclasses.dataclass(frozen=True)
class _Shards(shard_utils.ShardConfig):
    """The number of shards of each split, in the order of writing; TFDS has one number for all splits."""

    numbers: Iterator[int] = iter(())

    def get_number_shards(self, *arguments: Any, **named_arguments: Any) -> int:
        return next(self.numbers)


def write(
    folder: epath.Path,
    name: str,
    *,
    splits: Mapping[str, tuple[Iterable[dict[str, Any]], int]],
    encoding_format: str | None,
    metadata: dict[str, Any],
    negatives: bool,
    files: Mapping[str, bytes],
) -> None:
    """Writes the set FOLDER/NAME/VERSION.

    Args:
      folder: where the set goes.
      name: of the set.
      splits: the examples of each (see `data.example.encode`) with unique ids, and its number of files. A
        split with 0 files is left out.
      encoding_format: of the images, as TFDS's feature takes it.
      metadata: what the set says about itself.
      negatives: whether a region has negatives.
      files: name -> content of what is to stand beside the records.
    """
    splits = {split: pair for split, pair in splits.items() if pair[1]}

    class AnnotatedImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(record_folders.VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Images with captions and described regions, written by grain-jax build.",
                features=features(encoding_format, negatives),
                metadata=tfds.core.MetadataDict(metadata),
            )

        def _example_writer(self) -> writer.ExampleWriter:
            return _SortedFields(self.info.file_format or tfds.core.FileFormat.TFRECORD)

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {
                split: map(_with_key, items, itertools.repeat(negatives))
                for split, (items, _) in splits.items()
            }

        def _generate_examples(self):  # `_split_generators` has them
            raise NotImplementedError

    AnnotatedImages.name = name
    builder = AnnotatedImages(data_dir=folder)
    config = tfds.download.DownloadConfig()
    shards = _Shards(numbers=iter([count for _, count in splits.values()]))
    config.get_shard_config = lambda: shards
    tfds.disable_progress_bar()  # our own shows the time left
    # TFDS prints to stdout, and wants a folder for downloads although there are none.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    digests = {
        split: record_files.digest_of_split(builder.info.splits[split].filepaths, negatives)
        for split in splits
    }
    files = {**files, record_files.DIGEST_FILE: msgspec.json.encode(digests)}
    for file_name, content in files.items():
        (epath.Path(builder.data_dir) / file_name).write_bytes(content)


def _with_key(item: dict[str, Any], negatives: bool) -> tuple[str, dict[str, Any]]:
    """(key, example) as TFDS encodes it."""
    regions = []
    for region in item["regions"]:
        region = region | {"bbox": tfds.features.BBox(*region["bbox"])}
        texts = region.pop("negatives", [])
        regions.append(region | {"negatives": texts} if negatives else region)
    return item["id"], item | {"image": io.BytesIO(item["image"]), "regions": regions}
