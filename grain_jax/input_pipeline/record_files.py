"""The files of record sets: where they are, whether they are whole, and what tells them from others.

Digests of shards are taken of the records as they are read, in C++: SHA-256 over FarmHash Fingerprint64 of each record.
They find accidents, not forgeries.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# TensorFlow's banners tell a user nothing; decoding does not use oneDNN.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from grain_jax.config import Config, Dataset
from grain_jax.core import atomic, errors, regular_file
from grain_jax.input_pipeline import order, sources, text_lengths

DAMAGE = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
_FEATURES = ("image", "captions", "synthetic_caption", "regions")
_DESCRIPTIONS = ("dataset_info.json", "features.json")
_REBUILD = "rebuild the set with grain-jax build, or copy it anew"
_BUCKETS = 2**63 - 1
_AT_ONCE = 256  # records
_LEAST_BYTES = 16  # of a record: its length and the checksums of both
# Written by grain-jax build: split -> digest of its records; lengths, sizes and digests of its shards.
DIGEST_FILE = "digest.json"
_LOOKED_INTO = 64  # shards of a set without DIGEST_FILE, whose size and first record are digested


class DataError(errors.UserError):
    """A set, or one of its records, cannot be used; the message is one line."""


class RecordSet(NamedTuple):
    """A set of the config, as it lies on the storage."""

    source: Dataset
    directory: epath.Path  # of its newest version
    shards: tuple[order.ShardFile, ...]
    has_negatives: bool
    written: dict[str, Any]  # its entry in DIGEST_FILE; {}: it has none

    @property
    def shard_digests(self) -> dict[str, str]:
        """Shard's path -> digest that stands beside them; {}: none does."""
        paths = (shard.path for shard in self.shards)
        return dict(zip(paths, self.written.get("shard_digests", [])))


def find(config: Config) -> list[RecordSet]:
    """The newest version of each set that the config names.

    Raises:
      MissingData: no complete set is there.
      DataError: one lacks the split or a feature, or is not in TFRecord files.
    """
    return [_find(source) for source in config.input.sets]


def _find(source: Dataset) -> RecordSet:
    directory = text_lengths.newest_version(source)
    if directory is None:
        raise errors.MissingData(
            f"no record set {source.name!r} in {source.data_dir!r} (looked for"
            f" {epath.Path(source.data_dir) / source.name}/1.0.0); make it with: grain-jax build --annotations A.jsonl --images DIR"
            f" --output {source.data_dir or 'DIR'} --name {source.name or 'NAME'}"
        )
    info = read_info(directory)
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    missing = [name for name in _FEATURES if name not in features]
    split = dict(info.splits).get(source.split)
    if missing or not isinstance(split, tfds.core.SplitInfo):
        what = f"feature {', '.join(missing)}" if missing else f"split {source.split!r}"
        raise DataError(f"{directory} has no {what}; expected a set that grain-jax build wrote")
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f"{directory} is in {info.file_format} files, expected TFRecord")
    of_region = getattr(features["regions"], "feature", None)
    has_negatives = isinstance(of_region, tfds.features.FeaturesDict) and "negatives" in of_region
    split_shards = shards(directory, split)
    written = _of_split(directory, source.split)
    if written.get("shard_lengths") != [shard.num_records for shard in split_shards]:
        written = {}  # of other shards
    return RecordSet(source, directory, split_shards, has_negatives, written)


def read_info(directory: epath.Path) -> tfds.core.DatasetInfo:
    """What TFDS reads of the set in a folder.

    Raises:
      DataError: `dataset_info.json` or `features.json` is missing or damaged, or names other classes than TFDS's.
    """
    for name in _DESCRIPTIONS:
        path = directory / name
        try:
            content = regular_file.read_json(path, dict[str, Any], "an object")
            # TFDS imports the modules of these classes.
            foreign = [x for x in _values(content, "pythonClassName") if not _is_of_tfds(x)]
            if foreign:
                raise regular_file.FileError(
                    f"{path}: names the class {foreign[0]!r:.60}, expected TFDS's own"
                )
        except regular_file.FileError as error:
            raise DataError(f"{error}; {_REBUILD}") from None
    try:
        info = tfds.builder_from_directory(directory).info
        for split in info.splits.values():
            for path, _ in zip(split.filepaths, split.shard_lengths, strict=True):
                if not regular_file.inside(str(path).removeprefix(f"{directory}/")):
                    raise ValueError(f"names the file {path}, expected one of the set's folder")
        return info
    except Exception as error:  # of wrong types in either file there are all kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        files = " or ".join(_DESCRIPTIONS)
        raise DataError(f"{directory}: {files} is damaged ({reason}); {_REBUILD}") from None


def _values(content: Any, key: str) -> Iterator[Any]:
    """Every value of the key, at any depth."""
    if isinstance(content, dict):
        yield from (value for name, value in content.items() if name == key)
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _values(value, key)


def _is_of_tfds(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("tensorflow_datasets.")


def shards(directory: epath.Path, split: tfds.core.SplitInfo) -> tuple[order.ShardFile, ...]:
    """The shards of the split. A local one must not have the size that grain-jax build noted for another shard.

    A damaged record is found when it is read, and named then.

    Raises:
      DataError: the lengths cannot be, a shard is no regular file or has another one's name.
    """
    paths = list(map(os.fspath, split.filepaths))
    noted = _of_split(directory, split.name).get("shard_bytes", [])
    sizes = noted if len(noted) == len(paths) else [None] * len(paths)
    for path, length, size in zip(paths, split.shard_lengths, sizes, strict=True):
        if length < 0:
            raise DataError(
                f"{directory / _DESCRIPTIONS[0]}: a shard of {length} records; {_REBUILD}"
            )
        if "://" in path:
            continue
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise DataError(f"{path}: the shard is gone; {_REBUILD}") from None
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: no regular file; expected a shard that grain-jax build wrote")
        if size not in (None, found.st_size) and found.st_size in noted:
            raise DataError(
                f"{path}: got {found.st_size} bytes, which another shard has, expected {size}: shards have"
                f" each other's names; {_REBUILD}"
            )
        if length * _LEAST_BYTES > found.st_size:
            raise DataError(
                f"{path}: {found.st_size} bytes cannot be the {length} records that"
                f" {_DESCRIPTIONS[0]} says; {_REBUILD}"
            )
    return tuple(map(order.ShardFile, paths, split.shard_lengths))


def _of_split(directory: epath.Path, split: str) -> dict[str, Any]:
    """The entry of a split in DIGEST_FILE; {} where the set has no such file."""
    path = directory / DIGEST_FILE
    if not path.exists():
        return {}
    try:
        noted = regular_file.read_json(path, dict[str, dict[str, Any]], "digests")[split]
        for key in ("shard_lengths", "shard_bytes", "shard_digests"):
            if not isinstance(noted.get(key, []), list):
                raise TypeError
        lengths, digests = noted.get("shard_lengths", []), noted.get("shard_digests", [])
        if digests and len(digests) != len(lengths):
            raise TypeError
        return noted
    except (regular_file.FileError, KeyError, TypeError):
        raise DataError(
            f"{path}: not what grain-jax build writes, expected the split {split}; put it back, or remove it,"
            " and the files are compared instead"
        ) from None


def identity(one: RecordSet) -> sources.Identity:
    """What tells a set from others, wherever it lies.

    The order of the data depends on `shard_lengths`. `digest` is one of all `records` where grain-jax build wrote it
    beside them (one small file is read), else one of the `files`: the names of all shards, and the size and the
    first record of at most 64 shards, evenly spread. That takes 64 listings and 64 reads, 16 at a time; a change
    of other records that keeps all sizes is not found.

    Raises:
      DataError: a first record cannot be read.
    """
    if one.written:
        kind, digest = "records", one.written.get("digest")
    else:
        kind, digest = "files", _digest_of_files([epath.Path(s.path) for s in one.shards])
    return {
        "name": one.source.name,
        "split": one.source.split,
        "shard_lengths": [shard.num_records for shard in one.shards],
        "digest": digest,
        "digest_of": kind,
    }


def _digest_of_files(shards: Sequence[epath.Path]) -> str:
    chosen = [shards[i * len(shards) // _LOOKED_INTO] for i in range(_LOOKED_INTO)]
    chosen = list(dict.fromkeys(chosen))  # each once

    def look(path: epath.Path) -> list[Any]:
        try:
            first = next(tf.data.TFRecordDataset(str(path)).as_numpy_iterator(), b"")
            features = tf.train.Example.FromString(first).features.feature
            size = path.stat().length
        except (*DAMAGE, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise DataError(f"{path}, record 0: {reason}; rebuild the set") from None
        # Sorted: a protobuf map has no order.
        parts = [name.encode() + features[name].SerializeToString() for name in sorted(features)]
        return [size, hashlib.sha256(b"".join(parts)).hexdigest()]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        looked = list(pool.map(look, chosen))
    return hashlib.sha256(json.dumps([[p.name for p in shards], looked]).encode()).hexdigest()


def hashes(records: tf.Tensor) -> Any:
    """int64 [n], of serialized records [n]; the same on every machine."""
    return tf.strings.to_hash_bucket_fast(records, _BUCKETS)


def digest_of(of_records: np.ndarray) -> str:
    """64 hexadecimal digits, of the `hashes` of a shard's records in their order."""
    return hashlib.sha256(of_records.astype("<i8").tobytes()).hexdigest()


def digest_of_shard(path: epath.PathLike) -> str:
    """The digest of a shard, which is read for it."""
    parts = tf.data.TFRecordDataset(str(path)).batch(_AT_ONCE).map(hashes).as_numpy_iterator()
    return digest_of(np.concatenate([np.zeros(0, np.int64), *parts]))


class Comparison:
    """Compares each shard that a lane reads of a set, as often as it is read.

    Args:
      written: shard's path -> digest, those that stand beside the records. {}: there are none; the shards are compared
        with what the run saw when it read them first.
      notes: the file that keeps it; None: it is kept until the process ends.
      resumed: whether `notes` is of this run. A fresh start begins it anew.

    Attributes:
      fault: a line about a shard that is not what it was, or "".

    Raises:
      FileError: `notes` is no JSON of names and digests.
    """

    def __init__(self, written: Mapping[str, str], notes: epath.Path | None, resumed: bool):
        self.fault = ""
        self._written, self._notes = written, notes
        self._seen: dict[str, str] = {}  # by the shard's name: a set that was moved is the same
        if notes is not None and resumed and not written and notes.exists():
            self._seen = regular_file.read_json(notes, dict[str, str], "digests of shards")

    def take(self, shards: Sequence[order.ShardFile], of_records: np.ndarray) -> None:
        """Compares the shards of a block with the `hashes` of its records, int64 [n], shard after shard."""
        ends = np.cumsum([shard.num_records for shard in shards])[:-1]
        for shard, part in zip(shards, np.split(of_records, ends), strict=True):
            self._compare(shard.path, digest_of(part))

    def _compare(self, path: str, found: str) -> None:
        name = epath.Path(path).name
        if self._written:
            if found != self._written[path]:
                self.fault = (
                    f"{path}: not the records that grain-jax build wrote (digest.json): put the shard back, or build"
                    " the set again; if the change is meant, delete digest.json and take another --workdir"
                )
        elif name not in self._seen:
            self._seen[name] = found
            if self._notes is not None:
                # A full disk: the next save says so.
                with contextlib.suppress(OSError):
                    self._notes.parent.mkdir(parents=True, exist_ok=True)
                    atomic.write_text(self._notes, json.dumps(self._seen))
        elif found != self._seen[name]:
            made_anew = f"; if the content is the same, made anew, delete {self._notes}"
            self.fault = (
                f"{path}: not the records that this run read there before: put the shard back, or take another"
                f" --workdir{made_anew if self._notes else ''}"
            )
