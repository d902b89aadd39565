"""Reads a record set or an A.jsonl as a stream of `Item` and `Fault`."""

import functools
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax.core import errors
from grain_jax.core import images as images_lib
from grain_jax.data import example, parallel
from grain_jax.data.sources import tfds

SPLIT = "train"
_RECORDS_AHEAD = 64  # parsed before they are looked at
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
    orientation: str = "file"  # in which it is decoded, as of core.images
    original: tuple[int, int] | None = None  # width, height before grain-jax build squashed it

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height in its own ratio, as far as that is known."""
        return self.original or self.size


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
    orientation: str = "file"  # of its images, as of core.images
    squashed: int = (
        0  # side of the squares that its images were squashed to, their shape lost; 0: it is known
    )


def open_set(
    path: epath.PathLike, images: epath.PathLike | None, orientation: str = "exif"
) -> Source:
    """The set at `path`.

    Args:
      path: an `A.jsonl`, or the folder of a record set: OUTPUT/NAME or OUTPUT/NAME/VERSION.
      images: the folder of the images of an A.jsonl; None: the folder of the file.
      orientation: of the images of an A.jsonl, as of core.images; those of records are read as they are stored.

    Raises:
      errors.UserError: there is no such set, it has no line, or its records have other features.
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
    total = example.count_lines(path)
    given = dict(file=path.name, folder=str(folder), orientation=orientation)
    read = functools.partial(_read_line, **given)
    workers = parallel.default_workers(total)
    found = parallel.ordered_map(read, example.read_lines(path), workers=workers)
    items = itertools.chain.from_iterable(found)
    return Source(path, "annotations", items, total, (), {}, orientation)


def _read_line(
    line: example.Line, *, file: str, folder: str, orientation: str
) -> list[Item | Fault]:
    """The item of a line, or its faults, named as in data.build."""
    where = f"{file}:{line.number}"
    checked = example.check_line(line.text, folder, orientation=orientation)
    found, image = checked.annotation, checked.image
    if found is None:
        return [Fault(where, _cause(fault), fault) for fault in checked.faults]
    boxes = np.array([r.box_xyxy for r in found.regions], np.float32).reshape(-1, 4)
    scores = np.array([region.score for region in found.regions], np.float32)
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
            scores=scores,
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
    shards = list(zip(map(str, split.filepaths), split.shard_lengths, strict=True))
    metadata = record_files.notes_of_build(path)
    items, lengths = _read_records(shards), tuple(split.shard_lengths)
    squashed = record_files.squashed(path, info.features)
    given = path, "TFDS records", items, split.num_examples, lengths, metadata
    return Source(*given, squashed=squashed)


def _read_records(shards: list[tuple[str, int]]) -> Iterator[Item | Fault]:
    """All shards, one after another; a damaged shard is read up to the damage."""
    import tensorflow as tf

    from grain_jax.input_pipeline import transforms

    identity = tf.io.FixedLenFeature([], tf.string, default_value="")
    features = transforms.FEATURES | transforms.NEGATIVES | transforms.ORIGINAL_SIZE
    features |= {"id": identity}
    # As many numbers as there are, so that one wrong record is one fault.
    features["regions/bbox"] = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
    for path, expected in shards:
        name, read = epath.Path(path).name, 0
        records = tf.data.TFRecordDataset(path, buffer_size=_READ_BYTES)
        records = records.map(lambda record: tf.io.parse_single_example(record, features), 2)
        try:
            for fields in records.prefetch(_RECORDS_AHEAD).as_numpy_iterator():
                yield _to_item(f"{name}, record {read}", fields)
                read += 1
        except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
            last = f"{name}, after record {read - 1}" if read else f"{name}, at its start"
            yield Fault(last, "damaged shard", str(error.message).splitlines()[0][:200])
        except tf.errors.NotFoundError:
            yield Fault(name, "missing shard", f"got no such file, expected {expected} records")
        else:
            if read != expected:
                detail = f"got {read} records, expected {expected} by dataset_info.json"
                yield Fault(name, "shard length", detail)


def _to_item(where: str, fields: dict[str, Any]) -> Item | Fault:
    """The item of a record, `fields` as transforms.FEATURES parses it."""
    try:
        header = images_lib.header(fields["image"], orientation="file")
    except images_lib.ImageError as error:
        return Fault(where, "image", str(error))
    numbers, scores = fields["regions/bbox"], fields["regions/score"]
    descriptions = tuple(map(_text, fields["regions/description"]))
    negatives = tuple(map(_text, fields["regions/negatives/ragged_flat_values"]))
    # Of each region; sets without negatives have none.
    counts = fields["regions/negatives/ragged_row_lengths_0"].tolist() or [0] * len(descriptions)
    if not len(numbers) / 4 == len(descriptions) == len(scores) == len(counts):
        got = f"got {len(numbers) / 4:g} boxes, {len(descriptions)} descriptions, {len(scores)} scores"
        got += f", {len(counts)} counts of negatives"
        return Fault(where, "regions", f"{got}, expected as many of each")
    if sum(counts) != len(negatives) or min(counts, default=0) < 0:
        got = f"got {len(negatives)} negatives, {sum(counts)} by their counts"
        return Fault(where, "regions", f"{got}, expected the same number")
    texts = iter(negatives)
    original = tuple(fields["original_size"].tolist()[::-1])
    if original and (len(original) != 2 or min(original) < 1):
        return Fault(where, "original_size", f"got {original[::-1]}, expected height and width")
    return Item(
        name=_text(fields["id"]) or where,
        where=where,
        encoded=fields["image"],
        format=header.format,
        size=header.size,
        captions=tuple(map(_text, fields["captions"])),
        synthetic_caption=_text(fields["synthetic_caption"]),
        descriptions=descriptions,
        boxes_xyxy=numbers.reshape(-1, 4)[:, [1, 0, 3, 2]],
        scores=scores,
        negatives=tuple(tuple(itertools.islice(texts, count)) for count in counts),
        turned=header.turned,
        original=original or None,
    )


def _text(encoded: bytes) -> str:
    return encoded.decode("utf-8", errors="replace")
