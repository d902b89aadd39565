"""The data source "records": training batches from TFDS-format record sets, in the order of order.py.

It has the functions of sources.DataSource. The rows [i * b / lanes, (i + 1) * b / lanes) of a batch come from
lane i. Only the shards of the lanes that are asked for are opened, and of these only the blocks of the step.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from grain_jax.config import Config
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline import assemble, order, record_files, sources, tokenizer, transforms
from grain_jax.input_pipeline.record_files import DAMAGE, DataError

_READ_BYTES = 8 << 20  # a read from a remote file
_ENDLESS = 2**62
_CHOICES = 256  # records of a mixture whose sets are chosen at once


def check(config: Config) -> None:
    """Warns if hard negatives are asked for and no set has any.

    Raises:
      DataError: no set has any, and `loss.hard_negative` needs them.
      MissingData, DataError: as `record_files.find`.
    """
    sets = record_files.find(config)
    if not config.input.negatives_per_region or any(x.has_negatives for x in sets):
        return
    names = ", ".join(repr(x.source.name) for x in sets)
    got = (
        f"input.negatives_per_region={config.input.negatives_per_region}: no region of {names} has negatives"
    )
    if config.loss.hard_negative:
        raise DataError(
            f"{got}, which loss.hard_negative={config.loss.hard_negative:g} needs; add them to A.jsonl"
            " (grain-jax annotate --passes negatives) and build the set again, or set loss.hard_negative=0"
        )
    logging.warning("%s", got)


def num_examples(config: Config) -> int:
    """Records per epoch; in a mixture, the sum over its sets. Raises as `record_files.find`.

    With weights in proportion to the numbers of records, each record is seen once per epoch.
    """
    return sum(shard.num_records for x in record_files.find(config) for shard in x.shards)


def identities(config: Config) -> list[sources.Identity]:
    """What tells each set from others, wherever it lies. Raises as `record_files.find`."""
    return [
        {
            "name": x.source.name,
            "split": x.source.split,
            "shard_lengths": [shard.num_records for shard in x.shards],
            "digest": x.digest,
        }
        for x in record_files.find(config)
    ]


def num_shards(config: Config) -> dict[str, int]:
    """Name of each set -> number of its shards that have records. Raises as `record_files.find`."""
    return {
        x.source.name: sum(shard.num_records > 0 for shard in x.shards) for x in record_files.find(config)
    }


def batches(config: Config, *, lanes: Sequence[int] | None = None, start_step: int = 0) -> Iterator[Batch]:
    """The part of each global batch that comes from `lanes` (None: all), from `start_step` on, endless.

    Raises (here, not at the first batch):
      MissingData, DataError: as `record_files.find`.
      UserError: a set has fewer shards than `input.lanes`.
    A damaged record, or a shard that grain-jax build did not write, raises DataError at its batch.
    """
    sets = record_files.find(config)
    lanes_of_sets = [
        order.make_lanes(
            x.shards,
            name=x.source.name,
            lanes=sources.num_lanes(config),
            shards_per_block=config.input.shards_per_block,
            seed=order.seed_of_set(config.seed, i),
        )
        for i, x in enumerate(sets)
    ]
    every_lane = order.mix(lanes_of_sets, [x.source.weight for x in sets], seed=config.seed)
    served = every_lane if lanes is None else [every_lane[i] for i in lanes]
    return _batches(config, served, start_step)


def _batches(config: Config, lanes: list[order.MixedLane], step: int) -> Iterator[Batch]:
    text_tokenizer = tokenizer.of_tower(config.model.text)
    per_lane = config.batch_size // sources.num_lanes(config)
    changed: list[str] = []  # shards that are not what they were
    dataset = _dataset(config, lanes, per_lane, step, changed)
    iterator = dataset.as_numpy_iterator()
    while True:
        columns: Any = None
        try:
            columns = next(iterator)  # arrays, typed as one
        except DAMAGE as error:
            if not changed:
                raise _damage(lanes, per_lane, step, config, error) from None
        if changed:
            raise DataError(
                f"{changed[0]}: not the records that grain-jax build wrote (digest.json): put the shard"
                " back, or build the set again and take another --workdir"
            )
        yield assemble.of_columns(columns, text_tokenizer, config=config)
        step += 1


def _dataset(
    config: Config, lanes: list[order.MixedLane], per_lane: int, start_step: int, changed: list[str]
) -> tf.data.Dataset:
    """Batches of what `transforms.Transform` gives, in order."""
    position = start_step * per_lane
    streams = [_mixed_stream(lane, position, changed).batch(per_lane) for lane in lanes]
    transform = transforms.Transform(config)

    @record_files.as_it_is
    def together(*parts):
        return tuple(tf.concat(column, 0) for column in zip(*parts, strict=True))

    dataset = tf.data.Dataset.zip(tuple(streams)).map(together)
    dataset = dataset.unbatch().map(
        record_files.as_it_is(transform),
        num_parallel_calls=config.input.reader_threads or tf.data.AUTOTUNE,
        deterministic=True,
    )
    dataset = dataset.batch(per_lane * len(lanes), drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    if config.input.reader_threads:
        options.threading.private_threadpool_size = config.input.reader_threads
    return dataset.with_options(options)


def _mixed_stream(lane: order.MixedLane, position: int, changed: list[str]) -> tf.data.Dataset:
    """The `_lane_stream`s of the lane's sets, in the order in which it draws from them."""
    streams = [
        _lane_stream(stream, start, changed)
        for stream, start in zip(lane.streams, lane.positions(position), strict=True)
    ]
    if len(streams) == 1:
        return streams[0]

    @record_files.as_it_is
    def choose(first):
        chosen = tf.numpy_function(
            lambda first: lane.choices(int(first), int(first) + _CHOICES), [first], tf.int64
        )
        return tf.ensure_shape(chosen, [_CHOICES])

    choices = tf.data.Dataset.range(position, _ENDLESS, _CHOICES).map(choose).unbatch()
    return tf.data.Dataset.choose_from_datasets(streams, choices)


def _lane_stream(lane: order.Lane, position: int, changed: list[str]) -> tf.data.Dataset:
    """(serialized record, its draws) from that position on, endless; opens the block of the position first.

    `changed` gets the path of each shard that has another digest, before one of its records is served.
    """
    first = lane.ordinal(position)

    def plan(ordinal):
        block = lane.block(int(ordinal))
        skipped = position - block.first_position if ordinal == first else 0
        rest = np.arange(skipped, len(block.permutation))
        draws = order.uniforms(lane.draw_key, block.first_position + rest, transforms.NUM_DRAWS)
        paths = np.array([shard.path for shard in block.shards], object)
        return paths, np.int64(len(block.permutation)), block.permutation[rest], draws

    def compare(ordinal, hashes):
        shards = lane.block(int(ordinal)).shards
        ends = np.cumsum([shard.num_records for shard in shards])[:-1]
        for shard, part in zip(shards, np.split(hashes, ends), strict=True):
            if record_files.digest_of(part) != shard.digest:
                changed.append(shard.path)
        return np.int64(0)

    @record_files.as_it_is
    def load(ordinal):
        kinds = (tf.string, tf.int64, tf.int64, tf.float32)
        paths, length, chosen, draws = tf.numpy_function(plan, [ordinal], kinds)
        paths.set_shape([None])
        length.set_shape([])
        chosen.set_shape([None])
        draws.set_shape([None, transforms.NUM_DRAWS])
        files = tf.data.TFRecordDataset(paths, buffer_size=_READ_BYTES)
        records = files.batch(length).get_single_element()
        hashes = record_files.hashes(records)
        with tf.control_dependencies([tf.numpy_function(compare, [ordinal, hashes], tf.int64)]):
            return tf.gather(records, chosen), draws

    # Reads the next block while this one is served.
    return tf.data.Dataset.range(first, _ENDLESS).map(load).prefetch(1).unbatch()


def _damage(
    lanes: list[order.MixedLane], per_lane: int, step: int, config: Config, error: tf.errors.OpError
) -> DataError:
    """The error that names the record that cannot be read; reads the step's blocks again, one by one."""
    transform = transforms.Transform(config)
    whole = tf.fill([transforms.NUM_DRAWS], 0.999)  # these draws crop least
    begin, end = step * per_lane, (step + 1) * per_lane
    blocks = [
        stream.block(ordinal)
        for lane in lanes
        for stream, first, last in zip(lane.streams, lane.positions(begin), lane.positions(end))
        for ordinal in sorted({stream.ordinal(position) for position in range(first, last)})
    ]
    for shard in [shard for block in blocks for shard in block.shards]:
        count = 0
        try:
            for record in tf.data.TFRecordDataset(shard.path):
                transform(record, whole)
                count += 1
        except tf.errors.NotFoundError:
            return DataError(f"{shard.path}: the shard is gone; {record_files.REBUILD}")
        except DAMAGE as fault:
            return _damaged(f"{shard.path}, record {count}", fault)
    return DataError(f"step {step}: {str(error.message).splitlines()[0][:300]}")


def _damaged(where: str, error: Any) -> DataError:
    reason = str(error.message).splitlines()[0][:200]
    if isinstance(error, tf.errors.DataLossError):
        reason = "damaged (checksum)"
    return DataError(f"{where}: {reason}; {record_files.REBUILD}")
