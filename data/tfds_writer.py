"""Writes examples with TFDS's own writer, so that TFDS (and whatever builds on it) reads the set.

The set is written in a folder beside the final one and takes its place at the end (`data.staging`): a
build that is killed leaves nothing that looks complete, and loses no older set.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from data import example, staging


def features(encoding_format: str | None) -> tfds.features.FeaturesDict:
    """The record format; data/SCHEMA.md explains it."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format=encoding_format),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "synthetic_caption": tfds.features.Text(),
            "regions": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "description": tfds.features.Text(),
                    "score": tfds.features.Scalar(np.float32),
                }
            ),
        }
    )


class AnnotatedPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures with captions and described regions, from examples that are handed in.

    `name` is the set's; examples are dicts as `data.example.encode` returns them, ids unique.
    """

    VERSION = tfds.core.Version(example.VERSION)

    def __init__(
        self,
        *,
        name: str,
        data_dir: epath.PathLike,
        examples: Iterable[dict[str, Any]],
        encoding_format: str | None,
        metadata: dict[str, Any],
    ):
        self.name = name
        self._examples = examples
        self._encoding_format = encoding_format
        self._metadata = metadata
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures with captions and described regions, written by data.build.",
            features=features(self._encoding_format),
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for item in self._examples:
            regions = [
                region | {"bbox": tfds.features.BBox(*region["bbox"])} for region in item["regions"]
            ]
            picture = io.BytesIO(item["image"])
            yield item["id"], item | {"image": picture, "regions": regions}


def write(
    target: epath.Path,
    *,
    examples: Iterable[dict[str, Any]],
    encoding_format: str | None,
    metadata: dict[str, Any],
    num_shards: int,
) -> None:
    """Writes the set OUTPUT/NAME/VERSION (`target`); one that is there already is replaced at the end.

    Args:
      target: the set's folder; its last part is `data.example.VERSION`.
      examples: as `AnnotatedPictures` takes them; so are `encoding_format` and `metadata`.
      num_shards: files to spread them over.
    """
    name = target.parent.name
    with staging.replacing(target) as folder:
        builder = AnnotatedPictures(
            name=name,
            data_dir=folder,
            examples=examples,
            encoding_format=encoding_format,
            metadata=metadata,
        )
        tfds.disable_progress_bar()  # ours has the time left
        # TFDS announces on stdout, and wants a folder for downloads that are not.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(num_shards=num_shards),
            )
