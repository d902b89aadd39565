"""Reads a record set or an A.jsonl as a stream of `Item` and `Fault`."""

import functools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from grain_jax.data import annotations, example, parallel
from grain_jax.data.sources import tfds

from grain_jax import errors
from grain_jax.files import images as images_lib
from grain_jax.files import regular_file

SPLIT = "train"
_RECORDS_AT_ONCE = 64  # records parsed together
_READ_BYTES = 8 << 20


class InspectError(errors.UserError):
    """The set cannot be inspected; the message is one line."""


class Item(NamedTuple):
    """An image with its texts and boxes."""

    name: str
    where: str  # FILE:LINE, or SHARD, record N
    encoded: bytes
    format: str  # JPEG, PNG ...
    size: tuple[int, int]  # width, height in pixels
    captions: tuple[str, ...]  # of the web
    synthetic_caption: str  # "" where there is none
    descriptions: tuple[str, ...]
    boxes_xyxy: np.ndarray  # float32 [R, 4], shares of the image
    scores: np.ndarray  # float32 [R]
    negatives: tuple[tuple[str, ...], ...]  # of each region
    turned: bool = False  # its file has an EXIF orientation other than upright
    orientation: str = "file"  # in which it is decoded, as of files.images


class Fault(NamedTuple):
    """A line or record that cannot be used."""

    where: str
    cause: str  # one of few
    detail: str


class Source(NamedTuple):
    """A set, not read yet."""

    path: epath.Path
    kind: str  # "TFDS records" or "annotations"
    items: Iterator[Item | Fault]
    total: int  # number of items that the set claims to hold
    shard_lengths: tuple[int, ...]  # none for annotations
    metadata: dict[str, Any]
    orientation: str = "file"  # of its images, as of files.images


def open_set(
    path: epath.PathLike, images: epath.PathLike | None, orientation: str = "exif"
) -> Source:
    """The set at `path`.

    Args:
      path: an `A.jsonl`, or the folder of a record set: OUTPUT/NAME or OUTPUT/NAME/VERSION.
      images: the folder of the images of an A.jsonl; None: the folder of the file.
      orientation: of the images of an A.jsonl, as of files.images; those of records are read as they are stored.

    Raises:
      InspectError: there is no such set, or its records have other features.
      data.sources.SourceError: the folder holds no record set.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InspectError(f"{path}: no such file or folder, expected a record set or an A.jsonl")
    if path.is_dir():
        if images is not None:
            raise InspectError(
                f"--images {images}: {path} is a folder of records, which hold their images;"
                " expected an A.jsonl with --images"
            )
        return _records(tfds.directory(path))
    folder = epath.Path(path.parent if images is None else images)
    if not folder.is_dir():
        raise InspectError(f"--images {folder}: no such folder, expected the images of {path}")
    total = sum(1 for _ in example.read_lines(path))
    if not total:
        raise InspectError(f"{path}: the file is empty, expected one JSON object a line")
    items = _read_annotations(path, folder, total, orientation)
    return Source(path, "annotations", items, total, (), {}, orientation)


def _read_annotations(
    path: epath.Path, folder: epath.Path, total: int, orientation: str
) -> Iterator[Item | Fault]:
    workers = parallel.default_workers(total)
    read = functools.partial(
        _read_line, file=path.name, folder=str(folder), orientation=orientation
    )
    for found in parallel.ordered_map(read, example.read_lines(path), workers=workers):
        yield from found


def _read_line(
    line: example.Line, *, file: str, folder: str, orientation: str
) -> list[Item | Fault]:
    """The item of a line, or its faults, named as in data.build."""
    where = f"{file}:{line.number}"
    checked = annotations.check_line(line.text, folder, orientation=orientation)
    found, image = checked.annotation, checked.image
    if found is None:
        return [Fault(where, _cause(fault), fault) for fault in checked.faults]
    boxes = np.array([r.box_xyxy for r in found.regions], np.float32).reshape(-1, 4)
    return [
        Item(
            name=found.id or found.image,
            where=where,
            encoded=checked.encoded,
            format=checked.header.format,
            size=image.size,
            captions=found.captions,
            synthetic_caption=found.synthetic_caption,
            descriptions=tuple(region.description for region in found.regions),
            boxes_xyxy=boxes / np.array([*image.size, *image.size], np.float32),
            scores=np.array([region.score for region in found.regions], np.float32),
            negatives=tuple(region.negatives for region in found.regions),
            turned=checked.header.turned,
            orientation=orientation,
        )
    ]


def _cause(fault: str) -> str:
    """`regions[3].box: got ...` -> `regions.box`: the part that all faults of a kind share."""
    head, colon, _ = fault.partition(":")
    return re.sub(r"\[\d+\]", "", head) if colon else "not a JSON object"


def _records(path: epath.Path) -> Source:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow logs nothing of use here
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow_datasets as tfds  # its import takes seconds

    from grain_jax.input_pipeline import record_files

    info = record_files.read_info(path)
    wanted = ("image", "captions", "synthetic_caption", "regions")
    missing = [name for name in wanted if name not in info.features]
    if missing or SPLIT not in info.splits:
        what = f"no feature {', '.join(missing)}" if missing else f"no split {SPLIT!r}"
        raise InspectError(f"{path}: got {what}, expected a set that grain-jax build wrote")
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InspectError(f"{path}: got {info.file_format} files, expected TFRecord")
    split = info.splits[SPLIT]
    shards = [
        (str(shard), length)
        for shard, length in zip(split.filepaths, split.shard_lengths, strict=True)
    ]
    metadata = path / "metadata.json"
    return Source(
        path=path,
        kind="TFDS records",
        items=_read_records(shards),
        total=split.num_examples,
        shard_lengths=tuple(split.shard_lengths),
        metadata=regular_file.read_json(metadata, dict, "notes of a build")
        if metadata.exists()
        else {},
    )


def _read_records(shards: list[tuple[str, int]]) -> Iterator[Item | Fault]:
    """All shards, one after another; a damaged shard is read up to the damage."""
    import tensorflow as tf

    text = tf.io.RaggedFeature(tf.string)
    features = {
        "id": tf.io.FixedLenFeature([], tf.string, default_value=""),
        "image": tf.io.FixedLenFeature([], tf.string),
        "captions": text,
        "synthetic_caption": tf.io.FixedLenFeature([], tf.string, default_value=""),
        "regions/bbox": tf.io.RaggedFeature(tf.float32),
        "regions/description": text,
        "regions/score": tf.io.RaggedFeature(tf.float32),
        # As TFDS stores a list of texts a region; sets without negatives have neither.
        "regions/negatives/ragged_flat_values": text,
        "regions/negatives/ragged_row_lengths_0": tf.io.RaggedFeature(tf.int64),
    }
    for path, expected in shards:
        name, read = epath.Path(path).name, 0
        records = tf.data.TFRecordDataset(path, buffer_size=_READ_BYTES).batch(_RECORDS_AT_ONCE)
        records = records.map(lambda batch: tf.io.parse_example(batch, features)).prefetch(1)
        try:
            for columns in records:
                rows = [_rows(columns[key]) for key in features]
                for row in zip(*rows, strict=True):
                    yield _to_item(f"{name}, record {read}", *row)
                    read += 1
        except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
            # Records are parsed in batches, so only the place of the batch is known.
            last = f"{name}, after record {read - 1}" if read else f"{name}, at its start"
            yield Fault(last, "damaged shard", str(error.message).splitlines()[0][:200])
        except tf.errors.NotFoundError:
            yield Fault(name, "missing shard", f"got no such file, expected {expected} records")
        else:
            if read != expected:
                detail = f"got {read} records, expected {expected} by dataset_info.json"
                yield Fault(name, "shard length", detail)


def _rows(column) -> list:
    """A column of a parsed batch as a list of its rows."""
    return column.numpy().tolist() if not hasattr(column, "to_list") else column.to_list()


def _to_item(
    where, identity, encoded, captions, synthetic, boxes, descriptions, scores, negatives, counts
):
    try:
        header = images_lib.header(encoded, orientation="file")
    except images_lib.ImageError as error:
        return Fault(where, "image", str(error))
    if not len(boxes) == 4 * len(descriptions) == 4 * len(scores):
        detail = (
            f"got {len(boxes)} numbers of boxes, {len(descriptions)} descriptions and"
            f" {len(scores)} scores, expected four numbers and one score a description"
        )
        return Fault(where, "regions", detail)
    counts = counts or [0] * len(descriptions)
    if len(counts) != len(descriptions) or sum(counts) != len(negatives):
        detail = (
            f"got {len(negatives)} negatives, {sum(counts)} by the counts of {len(counts)} regions, expected a"
            f" count for each of {len(descriptions)}"
        )
        return Fault(where, "regions", detail)
    texts = iter(negatives)
    boxes_yxyx = np.array(boxes, np.float32).reshape(-1, 4)
    return Item(
        name=_text(identity) or where,
        where=where,
        encoded=encoded,
        format=header.format,
        size=header.size,
        captions=tuple(map(_text, captions)),
        synthetic_caption=_text(synthetic),
        descriptions=tuple(map(_text, descriptions)),
        boxes_xyxy=boxes_yxyx[:, [1, 0, 3, 2]],
        scores=np.array(scores, np.float32),
        negatives=tuple(tuple(_text(next(texts)) for _ in range(count)) for count in counts),
        turned=header.turned,
    )


def _text(encoded: bytes) -> str:
    return encoded.decode("utf-8", errors="replace")
