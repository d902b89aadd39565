"""Digests of shards, which tell that one is not what it was: taken of the records as they are read, in C++.

They find accidents, not forgeries: SHA-256 over FarmHash Fingerprint64 of each record.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from grain_jax.core import atomic, regular_file
from grain_jax.input_pipeline import order

_BUCKETS = 2**63 - 1
_AT_ONCE = 256  # records


def hashes(records: tf.Tensor) -> Any:
    """int64 [n], of serialized records [n]; the same on every machine."""
    return tf.strings.to_hash_bucket_fast(records, _BUCKETS)


def digest(of_records: np.ndarray) -> str:
    """64 hexadecimal digits, of the `hashes` of a shard's records in their order."""
    return hashlib.sha256(of_records.astype("<i8").tobytes()).hexdigest()


def of_file(path: epath.PathLike) -> str:
    """The digest of a shard, which is read for it."""
    parts = tf.data.TFRecordDataset(str(path)).batch(_AT_ONCE).map(hashes).as_numpy_iterator()
    return digest(np.concatenate([np.zeros(0, np.int64), *parts]))


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
            self._compare(shard.path, digest(part))

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
