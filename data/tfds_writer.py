"""Writes examples with TFDS's own writer, so that TFDS (and whatever builds on it) reads the set.

The set is written in a folder beside the final one and takes its place at the end (`data.staging`): a
build that is killed leaves nothing that looks complete, and loses no older set.
"""

import contextlib
import dataclasses
import errno
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer
from tensorflow_datasets.core.utils import shard_utils

from grain_jax.data import example, staging
from grain_jax.input_pipeline import record_files


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
    """Writes the fields of each record in the order of their names: protobuf's own differs between processes."""

    def write(self, path: epath.PathLike, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes a shard: (key, serialized example) of each record."""
        parsed = ((key, tf.train.Example.FromString(record)) for key, record in examples)
        written = ((key, item.SerializeToString(deterministic=True)) for key, item in parsed)
        return super().write(path, written)


def _builder(
    target: epath.Path,
    folder: epath.PathLike,
    splits: Mapping[str, Iterable[dict[str, Any]]],
    *,
    encoding_format: str | None,
    negatives: bool,
    metadata: dict[str, Any],
) -> tfds.core.DatasetBuilder:
    """TFDS's builder of the examples of each split, which writes in `folder`."""

    class AnnotatedImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = target.parent.name
        VERSION = tfds.core.Version(example.VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Pictures with captions and described regions, written by data.build.",
                features=features(encoding_format, negatives),
                metadata=tfds.core.MetadataDict(metadata),
            )

        def _example_writer(self) -> writer.ExampleWriter:
            return _SortedFields(self.info.file_format)

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(items) for split, items in splits.items()}

        def _generate_examples(self, items: Iterable[dict[str, Any]]):
            for item in items:
                regions = []
                for region in item["regions"]:
                    region = region | {"bbox": tfds.features.BBox(*region["bbox"])}
                    texts = region.pop("negatives", [])
                    regions.append(region | {"negatives": texts} if negatives else region)
                image = io.BytesIO(item["image"])
                yield item["id"], item | {"image": image, "regions": regions}

    return AnnotatedImages(data_dir=folder)


@dataclasses.dataclass(frozen=True)
class _Shards(shard_utils.ShardConfig):
    """TFDS has one number of shards for all splits; here each has its own, in the order of writing."""

    of_splits: Iterator[int] = iter(())

    def get_number_shards(self, *arguments: Any, **named_arguments: Any) -> int:
        return next(self.of_splits)


def write(
    target: epath.Path,
    *,
    splits: Mapping[str, tuple[Iterable[dict[str, Any]], int]],
    encoding_format: str | None,
    metadata: dict[str, Any],
    negatives: bool,
    files: Callable[[], Mapping[str, bytes]],
) -> None:
    """Writes the set OUTPUT/NAME/VERSION (`target`); one that is there already is replaced at the end.

    Args:
      target: the set's folder; its last part is `data.example.VERSION`.
      splits: the examples of each, dicts as `data.build.examples` yields them, ids unique, and how many files they are
        spread over; one with 0 files is left out.
      encoding_format: of the images, as TFDS's feature takes it.
      metadata: what the set says of itself.
      negatives: whether a region has negatives.
      files: gives name -> content of what is to stand beside the records; called when these are written.
    """
    splits = {split: given for split, given in splits.items() if given[1]}
    config = tfds.download.DownloadConfig()
    of_splits = _Shards(of_splits=iter([count for _, count in splits.values()]))
    config.get_shard_config = lambda: of_splits
    with staging.replacing(target) as folder:
        builder = _builder(
            target,
            folder,
            {split: items for split, (items, _) in splits.items()},
            encoding_format=encoding_format,
            negatives=negatives,
            metadata=metadata,
        )
        tfds.disable_progress_bar()  # ours has the time left
        # TFDS announces on stdout, and wants a folder for downloads that are not.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            try:
                builder.download_and_prepare(download_dir=downloads, download_config=config)
            except RuntimeError as error:  # TFDS makes one of TensorFlow's errors
                if "No space left on device" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, "No space left on device", str(target)) from None
        digests = {
            split: record_files.digest_of_split(builder.info.splits[split].filepaths, negatives)
            for split in splits
        }
        beside = {**files(), record_files.DIGEST_FILE: msgspec.json.encode(digests)}
        for file_name, content in beside.items():
            (epath.Path(builder.data_dir) / file_name).write_bytes(content)
