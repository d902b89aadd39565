"""The data source "records": training batches from TFDS-format record sets, in the order of order.py.

The functions are those of sources.DataSource. The rows [i * b / lanes, (i + 1) * b / lanes) of a batch come from
lane i. Only the shards of the lanes that are asked for are opened, and of these only the blocks of the step.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax.input_pipeline import record_files  # isort: skip  (before TensorFlow, whose logging it sets)
import numpy as np
import tensorflow as tf
from etils import epath

from grain_jax.config import Config, TextTower
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline import assemble, order, sources, tokenizer, transforms
from grain_jax.input_pipeline import text_lengths as text_lengths_lib
from grain_jax.input_pipeline.record_files import DAMAGE, DataError
from grain_jax.input_pipeline.text_cleaning import Texts

_UNEVEN = 1.1  # lanes whose lengths differ by more than this are worth a warning
_READ_BYTES = 8 << 20  # a read from a remote file
_ENDLESS = 2**62
_SAMPLED_SHARDS = 64  # at most, of which the first records are read for the lengths of their texts
_ADVICE = "rebuild the set with grain-jax build"
_CHOICES = 256  # records of a mixture whose sets are chosen at once


def check(config: Config) -> None:
    """Warns where hard negatives are asked for and no set has any.

    Raises:
      DataError: no set has any, and `loss.hard_negative` needs them.
      MissingData, DataError: as `record_files.find`.
    """
    found = record_files.find(config)
    if not config.input.negatives_per_region or any(one.has_negatives for one in found):
        return
    names = ", ".join(repr(one.source.name) for one in found)
    got = f"input.negatives_per_region={config.input.negatives_per_region}: no region of {names} has negatives"
    if config.loss.hard_negative:
        raise DataError(
            f"{got}, which loss.hard_negative={config.loss.hard_negative:g} needs; add them to A.jsonl (grain-jax annotate"
            " --passes negatives) and build the set again, or set loss.hard_negative=0"
        )
    logging.warning("%s", got)


def num_examples(config: Config) -> int:
    """Records per epoch; of a mixture, the sum over its sets. Raises as `record_files.find`.

    With weights in proportion to the numbers of records, each record is seen once per epoch.
    """
    return sum(shard.num_records for one in record_files.find(config) for shard in one.shards)


def identities(config: Config) -> list[sources.Identity]:
    """Those of the sets. Raises as `record_files.identity` and `record_files.find`."""
    return [record_files.identity(one) for one in record_files.find(config)]


def num_shards(config: Config) -> dict[str, int]:
    """Name of each set -> number of its shards that have records. Raises as `record_files.find`."""
    return {
        one.source.name: sum(shard.num_records > 0 for shard in one.shards)
        for one in record_files.find(config)
    }


def text_lengths(config: Config) -> list[text_lengths_lib.TextLengths]:
    """The lengths of the texts of each set: from the file beside its records, else of a sample of the records.

    Raises: as `record_files.find`; DataError where a record cannot be read.
    """
    tower = config.model.text
    return [
        text_lengths_lib.read(one.source, tower.tokenizer) or _sample(one, tower)
        for one in record_files.find(config)
    ]


def _sample(one: record_files.RecordSet, tower: TextTower) -> text_lengths_lib.TextLengths:
    """Lengths of the texts of the first records of shards that are spread over the set; no image is decoded."""
    features = {k: v for k, v in transforms.FEATURES.items() if k not in ("image", "regions/bbox")}
    if one.has_negatives:
        features |= transforms.NEGATIVES
    found = []
    for fields in _first_records(one, features, text_lengths_lib.IMAGES):
        names = ("captions", "synthetic_caption", "regions/description", "regions/score")
        web, synthetic, descriptions, scores = (fields[name] for name in names)
        best = text_lengths_lib.best_first(descriptions, scores)
        texts = ([text for text in web if text], synthetic, best)
        if one.has_negatives:
            flat, counts = (fields[name] for name in transforms.NEGATIVES)
            of_regions = np.split(flat, np.cumsum(counts)[:-1])
            texts += (text_lengths_lib.best_first(of_regions, scores),)
        found.append(texts)
    return text_lengths_lib.of_texts(
        found,
        tokenizer.of_tower(tower),
        name=repr(one.source.name),
        tokenizer=tower.tokenizer,
        records=sum(shard.num_records for shard in one.shards),
    )


def _first_records(
    one: record_files.RecordSet, features: Mapping[str, Any], number: int
) -> Iterator[dict[str, Any]]:
    """These features of the first records of shards that are spread over the set, about so many. Raises DataError."""
    shards = [shard for shard in one.shards if shard.num_records]
    chosen = [
        shards[i] for i in np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).round().astype(int)
    ]
    chosen = list(dict.fromkeys(chosen))
    each = -(-number // len(chosen))
    for shard in chosen:
        try:
            for record in tf.data.TFRecordDataset(shard.path, buffer_size=_READ_BYTES).take(each):
                fields = tf.io.parse_single_example(record, dict(features))
                yield {name: value.numpy() for name, value in fields.items()}
        except DAMAGE as error:
            reason = str(error.message).splitlines()[0][:200]
            raise DataError(f"{shard.path}: {reason}; {_ADVICE}") from None


def batches(
    config: Config,
    *,
    lanes: Sequence[int] | None = None,
    start_step: int = 0,
    notes: epath.Path | None = None,
) -> Iterator[Batch]:
    """The part of each global batch that comes from `lanes` (None: all of it), from `start_step` on, endless.

    Args:
      config, lanes, start_step, notes: see sources.DataSource.

    Raises (here, not at the first batch):
      MissingData, DataError: as `record_files.find`.
      order.OrderError: a set has fewer shards than `input.lanes`.
    A damaged record raises DataError with its shard and its place there, at the batch that it is in; a shard that is
    not what it was (record_files.Comparison) does before the first batch with one of its records.
    """
    sets = record_files.find(config)
    lanes_of_sets = [
        order.make_lanes(
            one.shards,
            name=one.source.name,
            lanes=sources.num_lanes(config),
            shards_per_block=config.input.shards_per_block,
            seed=order.seed_of_set(config.seed, i),
        )
        for i, one in enumerate(sets)
    ]
    every_lane = order.mix(lanes_of_sets, [one.source.weight for one in sets], seed=config.seed)
    served = every_lane if lanes is None else [every_lane[i] for i in lanes]
    for one, of_set in zip(sets, lanes_of_sets, strict=True):
        lengths = [lane.num_records for lane in of_set]
        if served[0].index == 0 and max(lengths) > _UNEVEN * min(lengths):
            logging.warning(
                "input.lanes=%d: lanes have %d to %d records of %r, so some are seen more often than"
                " others; a number of shards that is a multiple of the lanes avoids that",
                len(of_set),
                min(lengths),
                max(lengths),
                one.source.name,
            )
    comparisons = {
        (lane.index, i): record_files.Comparison(
            one.shard_digests, notes and notes / f"set{i}_lane{lane.index}.json", start_step > 0
        )
        for lane in served
        for i, one in enumerate(sets)
    }
    return _batches(config, served, start_step, comparisons)


Comparisons = Mapping[tuple[int, int], record_files.Comparison]  # of a lane's stream of a set


def _batches(
    config: Config,
    lanes: list[order.MixedLane],
    step: int,
    comparisons: Comparisons,
) -> Iterator[Batch]:
    text_tokenizer = tokenizer.of_tower(config.model.text)
    per_lane = config.batch_size // sources.num_lanes(config)
    dataset = _dataset(config, lanes, per_lane, step, comparisons)
    iterator = dataset.as_numpy_iterator()
    while True:
        try:
            columns: Any = next(iterator)  # arrays, typed as one
        except DAMAGE as error:
            raise _damage(lanes, per_lane, step, config, error) from None
        for fault in filter(None, (one.fault for one in comparisons.values())):
            raise DataError(fault)
        yield _to_batch(columns, config, text_tokenizer)
        step += 1


def _dataset(
    config: Config,
    lanes: list[order.MixedLane],
    per_lane: int,
    start_step: int,
    comparisons: Comparisons,
) -> tf.data.Dataset:
    """Batches of what `transforms.Transform` gives, in order."""
    position = start_step * per_lane
    streams = [_mixed_stream(lane, position, comparisons).batch(per_lane) for lane in lanes]
    transform = transforms.Transform(config)

    def together(*parts):
        return tuple(tf.concat(column, 0) for column in zip(*parts, strict=True))

    dataset = tf.data.Dataset.zip(tuple(streams)).map(together)
    dataset = dataset.unbatch().map(
        transform,
        num_parallel_calls=config.input.reader_threads or tf.data.AUTOTUNE,
        deterministic=True,
    )
    dataset = dataset.batch(per_lane * len(lanes), drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    if config.input.reader_threads:
        options.threading.private_threadpool_size = config.input.reader_threads
    return dataset.with_options(options)


def _mixed_stream(
    lane: order.MixedLane, position: int, comparisons: Comparisons
) -> tf.data.Dataset:
    """The `_lane_stream`s of the lane's sets, in the order in which it draws from them."""
    streams = [
        _lane_stream(stream, at, comparisons[lane.index, i].take)
        for i, (stream, at) in enumerate(zip(lane.streams, lane.positions(position), strict=True))
    ]
    if len(streams) == 1:
        return streams[0]

    def choose(first):
        chosen = tf.numpy_function(
            lambda first: lane.choices(int(first), int(first) + _CHOICES), [first], tf.int64
        )
        return tf.ensure_shape(chosen, [_CHOICES])

    choices = tf.data.Dataset.range(position, _ENDLESS, _CHOICES).map(choose).unbatch()
    return tf.data.Dataset.choose_from_datasets(streams, choices)


def _lane_stream(
    lane: order.Lane,
    position: int,
    take: Callable[[Sequence[order.ShardFile], np.ndarray], None] = lambda *_: None,
) -> tf.data.Dataset:
    """(serialized record, its draws) from that position on, endless; opens the block of the position first.

    `take` gets the shards of each block, and the hashes of all its records before one of them is served.
    """
    first = lane.ordinal(position)

    def plan(ordinal):
        block = lane.block(int(ordinal))
        skipped = position - block.first_position if ordinal == first else 0
        places = np.arange(skipped, len(block.permutation))
        draws = order.uniforms(lane.draw_key, block.first_position + places, transforms.NUM_DRAWS)
        paths = np.array([shard.path for shard in block.shards], object)
        return paths, np.int64(len(block.permutation)), block.permutation[places], draws

    def compare(ordinal, hashes):
        take(lane.block(int(ordinal)).shards, hashes)
        return np.int64(0)

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


def _to_batch(
    columns: dict[str, Any], config: Config, text_tokenizer: tokenizer.Tokenizer
) -> Batch:
    def tokens_of(name: str, mask_name: str) -> Texts:
        mask = columns[mask_name]
        return assemble.tokenize(columns.pop(name)[mask], text_tokenizer, config.text_length)

    return assemble.assemble(
        captions=tokens_of("captions", "caption_mask"),
        descriptions=tokens_of("descriptions", "region_mask"),
        negatives=tokens_of("negatives", "negative_mask"),
        config=config,
        **columns,
    )


def _damage(
    lanes: list[order.MixedLane],
    per_lane: int,
    step: int,
    config: Config,
    error: tf.errors.OpError,
) -> DataError:
    """The error that names the record of the step that cannot be read; reads each again, one by one."""
    begin, end = step * per_lane, (step + 1) * per_lane
    transform = transforms.Transform(config)
    stretches = [
        (stream, range(first, last))
        for lane in lanes
        for stream, first, last in zip(lane.streams, lane.positions(begin), lane.positions(end))
    ]
    for lane, positions in stretches:
        for ordinal in sorted({lane.ordinal(p) for p in positions}):
            for shard in lane.block(ordinal).shards:
                count = 0
                try:
                    for _ in tf.data.TFRecordDataset(shard.path):
                        count += 1
                except tf.errors.NotFoundError:
                    return DataError(f"{shard.path}: the shard is gone; {_ADVICE}")
                except tf.errors.DataLossError:
                    return DataError(f"{shard.path}, record {count}: damaged (checksum); {_ADVICE}")
                if count != shard.num_records:
                    return DataError(
                        f"{shard.path}: got {count} records, expected {shard.num_records}; {_ADVICE}"
                    )
        stream = _lane_stream(lane, positions.start)
        for position, (record, draws) in zip(positions, stream):
            try:
                transform(record, draws)
            except tf.errors.InvalidArgumentError as fault:
                path, index = lane.locate(position)
                reason = str(fault.message).splitlines()[0][:200]
                return DataError(f"{path}, record {index}: {reason}; {_ADVICE}")
    return DataError(f"step {step}: {str(error.message).splitlines()[0][:300]}")
