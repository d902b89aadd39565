"""Training batches from a TFDS-format record set, in the order of order.py.

    check(config)         are the sets there, and have they what training needs?
    num_examples(config)  records an epoch
    identities(config)    what tells the sets from others, for the checkpoints
    batches(config, ...)  each global batch, or what some lanes have of it, from any step on

A batch's rows [i * b / lanes, (i + 1) * b / lanes) come from lane i. Only the shards of the lanes that are
asked for are opened, and of these only the blocks of the step.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# TensorFlow's banners tell a user nothing; decoding does not use oneDNN.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402
from etils import epath  # noqa: E402

from grain_jax import errors
from grain_jax.config import Config, Dataset, TextTower  # noqa: E402
from grain_jax.input_pipeline import assemble, order, sources, tokenizer, transforms  # noqa: E402
from grain_jax.input_pipeline import text_lengths as text_lengths_lib  # noqa: E402
from grain_jax.schema import Batch  # noqa: E402

_FEATURES = ("image", "captions", "synthetic_caption", "regions")
_DAMAGE = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
_DESCRIPTIONS = ("dataset_info.json", "features.json")
_REBUILD = "rebuild the set with data.build, or copy it anew"
_LEAST_BYTES = 16  # of a record: its length and the checksums of both
_UNEVEN = 1.1  # lanes whose lengths differ by more than this are worth a warning
_READ_BYTES = 8 << 20  # a read from a remote file
_ENDLESS = 2**62
_SAMPLED_SHARDS = 64  # at most, of which the first records are read for the lengths of their texts
_CHOICES = 256  # records of a mixture whose sets are chosen at once

DIGEST_FILE = (
    "digest.json"  # of data.build: split -> digest of its records, lengths and sizes of its shards
)
_LOOKED_INTO = 64  # shards of a set without it, whose size and first record stand for its content


class DataError(errors.UserError):
    """The set is there but cannot be used, or one of its records cannot; the message is one line."""


class RecordSet(NamedTuple):
    """Where a set is and the lengths of its shards."""

    source: Dataset
    directory: epath.Path
    shards: tuple[order.Shard, ...]


def check(config: Config) -> None:
    """Raises as `find`."""
    find(config)


def find(config: Config) -> list[RecordSet]:
    """The newest version of each set that the config names.

    Raises:
      MissingData: no complete set is there.
      DataError: one has not the split, other features, or is not in TFRecord files.
    """
    return [_find(source) for source in config.input.sets]


def _find(source: Dataset) -> RecordSet:
    directory = text_lengths_lib.newest_version(source)
    if directory is None:
        raise errors.MissingData(
            f"no record set {source.name!r} in {source.data_dir!r} (looked for"
            f" {epath.Path(source.data_dir) / source.name}/1.0.0); make it with: python -m data.build --annotations A.jsonl --images DIR"
            f" --output {source.data_dir or 'DIR'} --name {source.name or 'NAME'}"
        )
    info = read_info(directory)
    missing = [name for name in _FEATURES if name not in info.features]
    if missing or source.split not in info.splits:
        what = f"feature {', '.join(missing)}" if missing else f"split {source.split!r}"
        raise DataError(f"{directory} has no {what}; expected a set that data.build wrote")
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f"{directory} is in {info.file_format} files, expected TFRecord")
    return RecordSet(source, directory, _shards(directory, info.splits[source.split]))


def read_info(directory: epath.Path) -> tfds.core.DatasetInfo:
    """What TFDS knows of the set in a folder.

    Raises:
      DataError: `dataset_info.json` or `features.json` is missing or damaged, or names other classes than TFDS's.
    """
    for name in _DESCRIPTIONS:
        path = directory / name
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError(f"got a {type(content).__name__}, expected an object")
            # TFDS imports the modules of these names.
            foreign = [x for x in _values(content, "pythonClassName") if not _is_of_tfds(x)]
            if foreign:
                raise ValueError(f"names the class {foreign[0]!r:.60}, expected TFDS's own")
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            raise DataError(f"{path}: {reason}; {_REBUILD}") from None
    try:
        info = tfds.builder_from_directory(directory).info
        for split in info.splits.values():
            list(zip(split.filepaths, split.shard_lengths, strict=True))
        return info
    except Exception as error:  # of wrong types in either file there are all kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        files = " or ".join(_DESCRIPTIONS)
        raise DataError(f"{directory}: {files} is damaged ({reason}); {_REBUILD}") from None


def _values(content: Any, key: str) -> Iterator[Any]:
    """All that stands under the key, however deep."""
    if isinstance(content, dict):
        yield from (value for name, value in content.items() if name == key)
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _values(value, key)


def _is_of_tfds(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("tensorflow_datasets.")


def _shards(directory: epath.Path, split: tfds.core.SplitInfo) -> tuple[order.Shard, ...]:
    """The split's shards; of those on a disk, each has the size that data.build noted for it, not for another.

    What is damaged inside is found when it is read, which names the record.
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
        except FileNotFoundError:  # whoever reads it says so
            continue
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: no regular file; expected a shard that data.build wrote")
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
    return tuple(map(order.Shard, paths, split.shard_lengths))


def _of_split(directory: epath.Path, split: str) -> dict[str, Any]:
    """What data.build noted of a split in DIGEST_FILE; nothing of a set that has no such file."""
    path = directory / DIGEST_FILE
    if not path.exists():
        return {}
    try:
        noted = dict(json.loads(path.read_bytes())[split])
        for key in ("shard_lengths", "shard_bytes"):
            if not isinstance(noted.get(key, []), list):
                raise TypeError
        return noted
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{path}: not what data.build writes, expected the split {split}; put it back, or remove it,"
            " and the files are compared instead"
        ) from None


def num_examples(config: Config) -> int:
    """Records an epoch: of a mixture, as many as all its sets have together. Raises as `find`.

    With weights as the numbers of records, each is seen once an epoch; twice the weight, twice as often.
    """
    return sum(shard.num_records for one in find(config) for shard in one.shards)


def identities(config: Config) -> list[sources.Identity]:
    """What tells each set of the config from others, wherever it lies, ready for JSON.

    `shard_lengths`, which the order of the data depends on, and `digest`, of the content. That is of all
    `records` where data.build has written it beside them: one small file is read. Of other sets it is of the
    `files`: the names of the shards, and of at most 64 of them, evenly spread, the size and the first record.
    That takes 64 listings and 64 reads, 16 at a time, however many shards there are; a change of other records
    that keeps all sizes is not seen. Raises as `find`, and DataError where a first record cannot be read.
    """
    return [_identity(one) for one in find(config)]


def _identity(one: RecordSet) -> sources.Identity:
    lengths = [shard.num_records for shard in one.shards]
    written = _of_split(one.directory, one.source.split)
    if written.get("shard_lengths") == lengths:  # else it is of other shards than these
        kind, digest = "records", written.get("digest")
    else:
        kind, digest = "files", _digest_of_files([epath.Path(s.path) for s in one.shards])
    return {
        "name": one.source.name,
        "split": one.source.split,
        "shard_lengths": lengths,
        "digest": digest,
        "digest_of": kind,
    }


def _digest_of_files(shards: Sequence[epath.Path]) -> str:
    chosen = [shards[i * len(shards) // _LOOKED_INTO] for i in range(_LOOKED_INTO)]
    chosen = list(dict.fromkeys(chosen))  # all, where there are fewer

    def look(path: epath.Path) -> list[Any]:
        try:
            first = next(tf.data.TFRecordDataset(str(path)).as_numpy_iterator(), b"")
            features = tf.train.Example.FromString(first).features.feature
            size = path.stat().length
        except (*_DAMAGE, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise DataError(f"{path}, record 0: {reason}; rebuild the set") from None
        # By name: the bytes of a map are in no order.
        parts = [name.encode() + features[name].SerializeToString() for name in sorted(features)]
        return [size, hashlib.sha256(b"".join(parts)).hexdigest()]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        looked = list(pool.map(look, chosen))
    return hashlib.sha256(json.dumps([[p.name for p in shards], looked]).encode()).hexdigest()


def num_shards(config: Config) -> dict[str, int]:
    """Name -> files that have records, of each set. Raises as `find`."""
    return {
        one.source.name: sum(shard.num_records > 0 for shard in one.shards) for one in find(config)
    }


def text_lengths(config: Config) -> list[text_lengths_lib.TextLengths]:
    """The lengths of the texts of each set: as they stand beside its records, else of a sample of these.

    Raises: as `find`; DataError where a record cannot be read.
    """
    tower = config.model.text
    return [
        text_lengths_lib.read(one.source, tower.tokenizer) or _sample(one, tower)
        for one in find(config)
    ]


def _sample(one: RecordSet, tower: TextTower) -> text_lengths_lib.TextLengths:
    """The first records of shards that are spread over the set; no image is decoded."""
    shards = [shard for shard in one.shards if shard.num_records]
    chosen = [
        shards[i] for i in np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).round().astype(int)
    ]
    chosen = list(dict.fromkeys(chosen))
    each = -(-text_lengths_lib.IMAGES // len(chosen))
    features = {k: v for k, v in transforms.FEATURES.items() if k not in ("image", "regions/bbox")}
    images = []
    for shard in chosen:
        try:
            for record in tf.data.TFRecordDataset(shard.path, buffer_size=_READ_BYTES).take(each):
                fields = tf.io.parse_single_example(record, features)
                web, synthetic, descriptions, scores = (
                    fields[name].numpy()
                    for name in (
                        "captions",
                        "synthetic_caption",
                        "regions/description",
                        "regions/score",
                    )
                )
                best = text_lengths_lib.best_first(descriptions, scores)
                images.append(([text for text in web if text], synthetic, best))
        except _DAMAGE as error:
            reason = str(error.message).splitlines()[0][:200]
            raise DataError(f"{shard.path}: {reason}; rebuild the set with data.build") from None
    return text_lengths_lib.of_texts(
        images,
        tokenizer.of_tower(tower),
        name=repr(one.source.name),
        tokenizer=tower.tokenizer,
        records=sum(shard.num_records for shard in shards),
    )


def batches(
    config: Config, *, lanes: Sequence[int] | None = None, start_step: int = 0
) -> Iterator[Batch]:
    """The part of each global batch that comes from `lanes` (None: all of it), from `start_step` on, endless.

    Raises (here, not at the first batch):
      MissingData, DataError: as `find`.
      order.OrderError: a set has fewer shards than `input.lanes`.
    A damaged record raises DataError, naming its shard and its place there, when its batch is due.
    """
    sets = find(config)
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
    return _batches(config, served, start_step)


def _batches(config: Config, lanes: list[order.MixedLane], step: int) -> Iterator[Batch]:
    text_tokenizer = tokenizer.of_tower(config.model.text)
    per_lane = config.batch_size // sources.num_lanes(config)
    dataset = _dataset(config, lanes, per_lane, step)
    iterator = dataset.as_numpy_iterator()
    while True:
        try:
            columns = next(iterator)
        except _DAMAGE as error:
            transform = transforms.Transform.from_config(config)
            raise _damage(lanes, per_lane, step, transform, error) from None
        yield _to_batch(columns, config, text_tokenizer)
        step += 1


def _dataset(
    config: Config, lanes: list[order.MixedLane], per_lane: int, start_step: int
) -> tf.data.Dataset:
    """Batches of `transforms.Example`, in order."""
    streams = [_mixed_stream(lane, start_step * per_lane).batch(per_lane) for lane in lanes]
    dataset = tf.data.Dataset.zip(tuple(streams)).map(
        lambda *parts: tuple(tf.concat(column, 0) for column in zip(*parts, strict=True))
    )
    dataset = dataset.unbatch().map(
        transforms.Transform.from_config(config),
        num_parallel_calls=config.input.reader_threads or tf.data.AUTOTUNE,
        deterministic=True,
    )
    dataset = dataset.batch(per_lane * len(lanes), drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    if config.input.reader_threads:
        options.threading.private_threadpool_size = config.input.reader_threads
    return dataset.with_options(options)


def _mixed_stream(lane: order.MixedLane, position: int) -> tf.data.Dataset:
    """The `_lane_stream`s of the lane's sets, in the order in which it draws from them."""
    streams = [
        _lane_stream(stream, at)
        for stream, at in zip(lane.streams, lane.positions(position), strict=True)
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


def _lane_stream(lane: order.Lane, position: int) -> tf.data.Dataset:
    """(serialized record, its draws) from that position on, endless; opens the block it stands in first."""
    first = lane.ordinal(position)

    def plan(ordinal):
        block = lane.block(int(ordinal))
        skipped = position - block.first_position if ordinal == first else 0
        places = np.arange(skipped, len(block.permutation))
        draws = order.uniforms(lane.draw_key, block.first_position + places, transforms.NUM_DRAWS)
        paths = np.array([shard.path for shard in block.shards], object)
        return paths, np.int64(len(block.permutation)), block.permutation[places], draws

    def load(ordinal):
        paths, length, chosen, draws = tf.numpy_function(
            plan, [ordinal], (tf.string, tf.int64, tf.int64, tf.float32)
        )
        paths.set_shape([None])
        length.set_shape([])
        chosen.set_shape([None])
        draws.set_shape([None, transforms.NUM_DRAWS])
        files = tf.data.TFRecordDataset(paths, buffer_size=_READ_BYTES)
        records = files.batch(length).get_single_element()
        return tf.gather(records, chosen), draws

    # The next block is read while this one is served.
    return tf.data.Dataset.range(first, _ENDLESS).map(load).prefetch(1).unbatch()


def _to_batch(columns: tuple, config: Config, text_tokenizer: tokenizer.Tokenizer) -> Batch:
    examples = transforms.Example(*columns)
    captions, descriptions = examples.caption, examples.descriptions[examples.region_mask]
    if examples.flipped.any():
        captions = captions.copy()
        rows = np.nonzero(examples.region_mask)[0]
        for texts, flipped in (
            (captions, examples.flipped),
            (descriptions, examples.flipped[rows]),
        ):
            texts[flipped] = [assemble.exchange_sides(t.decode()) for t in texts[flipped]]
    context_length = config.model.text.context_length
    return assemble.assemble(
        image=examples.image,
        captions=assemble.tokenize(captions, text_tokenizer, context_length),
        descriptions=assemble.tokenize(descriptions, text_tokenizer, context_length),
        region_boxes_cxcywh=examples.region_boxes_cxcywh,
        region_mask=examples.region_mask,
        region_scores=examples.region_scores,
        config=config,
    )


def _damage(
    lanes: list[order.MixedLane],
    per_lane: int,
    step: int,
    transform: transforms.Transform,
    error: tf.errors.OpError,
) -> DataError:
    """Which record of that step's batch could not be read; looks at each again, one by one."""
    advice = "rebuild the set with data.build"
    begin, end = step * per_lane, (step + 1) * per_lane
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
                    return DataError(f"{shard.path}: the shard is gone; {advice}")
                except tf.errors.DataLossError:
                    return DataError(f"{shard.path}, record {count}: damaged (checksum); {advice}")
                if count != shard.num_records:
                    return DataError(
                        f"{shard.path}: got {count} records, expected {shard.num_records}; {advice}"
                    )
        stream = _lane_stream(lane, positions.start)
        for position, (record, draws) in zip(positions, stream):
            try:
                transform(record, draws)
            except tf.errors.InvalidArgumentError as fault:
                path, index = lane.locate(position)
                reason = str(fault.message).splitlines()[0][:200]
                return DataError(f"{path}, record {index}: {reason}; {advice}")
    return DataError(f"step {step}: {str(error.message).splitlines()[0][:300]}")
