"""The files of record sets, as grain-jax build writes them: where they are, and what tells them from others.

Beside the records of a set lies `digest.json`, which names each shard, its records, its bytes and a digest:
SHA-256 over FarmHash Fingerprint64 of each record. The digests find accidents, not forgeries.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np
import tensorflow as tf
from etils import epath

from grain_jax.config import Config, Dataset
from grain_jax.core import errors, regular_file
from grain_jax.input_pipeline import order, record_folders

DAMAGE = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
DIGEST_FILE = "digest.json"  # split -> SplitDigest
REBUILD = "rebuild the set with grain-jax build, or copy it anew"
_BUCKETS = 2**63 - 1
_BATCH = 256  # records
# AutoGraph would leave a file among the temporary ones for each mapped function; none of ours needs it.
as_it_is = tf.autograph.experimental.do_not_convert


class DataError(errors.UserError):
    """A set, or one of its records, cannot be used; the message is one line."""


class ShardDigest(msgspec.Struct):
    """A shard in DIGEST_FILE."""

    name: str  # of its file
    records: int
    bytes: int
    digest: str


class SplitDigest(msgspec.Struct):
    """A split in DIGEST_FILE."""

    digest: str  # of the digests of its shards
    negatives: bool  # whether regions have hard negatives
    shards: list[ShardDigest]


class RecordSet(NamedTuple):
    """A set of the config, as it lies on the storage."""

    source: Dataset
    digest: str
    shards: tuple[order.ShardFile, ...]
    has_negatives: bool


def find(config: Config) -> list[RecordSet]:
    """Each set that the config names.

    Raises:
      MissingData: no complete set is there.
      DataError: one lacks the split, a shard or DIGEST_FILE, or a local shard has another size.
    """
    return [_find(source) for source in config.input.sets]


def _find(source: Dataset) -> RecordSet:
    directory = record_folders.existing_folder_of(source)
    try:
        splits = regular_file.read_json(
            directory / DIGEST_FILE, dict[str, SplitDigest], "what grain-jax build writes"
        )
    except regular_file.FileError as error:
        raise DataError(f"{error}; {REBUILD}") from None
    if source.split not in splits:
        raise DataError(f"{directory} has no split {source.split!r}, expected one of {', '.join(splits)}")
    split = splits[source.split]
    shards = []
    for shard in split.shards:
        path = str(directory / epath.Path(shard.name).name)
        try:  # remote shards are looked at when they are read
            size = shard.bytes if "://" in path else os.stat(path).st_size
        except OSError:
            raise DataError(f"{path}: the shard is gone; {REBUILD}") from None
        if size != shard.bytes:
            raise DataError(f"{path}: got {size} bytes, expected {shard.bytes}; {REBUILD}")
        shards.append(order.ShardFile(path, shard.records, shard.digest))
    return RecordSet(source, split.digest, tuple(shards), split.negatives)


@as_it_is
def hashes(records: tf.Tensor) -> tf.Tensor:
    """int64 [n], of serialized records [n]; the same on every machine."""
    return tf.strings.to_hash_bucket_fast(records, _BUCKETS)


def digest_of(record_hashes: np.ndarray) -> str:
    """64 hexadecimal digits, of the `hashes` of a shard's records in their order."""
    return hashlib.sha256(record_hashes.astype("<i8").tobytes()).hexdigest()


def digest_of_split(paths: Iterable[epath.PathLike], negatives: bool) -> SplitDigest:
    """Reads the shards of a split and describes it as DIGEST_FILE does."""
    shards = []
    for path in map(epath.Path, paths):
        parts = tf.data.TFRecordDataset(str(path)).batch(_BATCH).map(hashes).as_numpy_iterator()
        record_hashes = np.concatenate([np.zeros(0, np.int64), *parts])
        size, digest = path.stat().length, digest_of(record_hashes)
        shards.append(ShardDigest(path.name, len(record_hashes), size, digest))
    whole = hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()
    return SplitDigest(whole, negatives, shards)
