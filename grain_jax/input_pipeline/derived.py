"""Numbers for the keys that a config leaves open: `input.lanes`, `text.pack_group`, `text.pack_rows` set to None.

Lanes and group follow from batch, micro-batches and devices. The rows follow from the lengths of the texts of
the dataset, so that at most `MISFITS` of them are dropped or cut. config.json and the checkpoints of a run hold the
numbers, and a resumed run takes them from there. Needs neither JAX nor TensorFlow.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import Config
from grain_jax.core import errors
from grain_jax.input_pipeline import packing, synthetic, text_lengths
from grain_jax.input_pipeline.text_lengths import TextLengths

KEYS = ("input.lanes", "text.pack_group", "text.pack_rows")
LANES = 16  # unless the processes, shards or batch ask for another number
LANE_IMAGES = 16  # images of a lane in a small batch: smaller packing groups leave much padding
LARGEST_GROUP = 64  # images; larger groups save little more padding
MISFITS = 1e-3  # share of the texts that may be dropped or cut
_DRAWS = 8  # groupings of the sample, in each of which MISFITS holds
_GROUPS = 256  # of images in a draw, at least


class Limits(NamedTuple):
    """The devices, processes and data that the numbers must suit.

    Attributes:
      parts: shards of the batch (data x fsdp).
      lanes: the number of lanes is a multiple of this (`sharding.lanes_needed`).
      shards: name of each dataset -> number of its shards; {}: not known, or any number of lanes will do.
    """

    parts: int = 1
    lanes: int = 1
    shards: Mapping[str, int] = {}


def is_open(config: Config) -> bool:
    """Whether the config has a number left to derive."""
    return None in _numbers(config).values()


def resolve(
    config: Config,
    limits: Limits,
    lengths: Callable[[], Sequence[TextLengths]],
    stored: Config | None = None,
    where: str = "",
) -> tuple[Config, str]:
    """The config with numbers, and a line that says which were derived from what ("": none).

    Args:
      config: of the user.
      limits: of the run.
      lengths: gives the text lengths of each dataset; called if rows must be derived.
      stored: the config of the checkpoint that the run resumes from; its numbers are taken.
      where: that checkpoint, in words.

    Raises:
      UserError: no number is possible.
    """
    if not is_open(config):
        return config, ""
    before = dict.fromkeys(KEYS)  # the numbers in the checkpoint
    # Another batch size makes another run, which `checkpoint.check_same_run` refuses.
    if stored and stored.batch_size == config.batch_size:
        before = _numbers(stored)
    numbers, said = _numbers(config), []
    if not config.text.packing:
        numbers |= {KEYS[1]: 1, KEYS[2]: config.input.texts_per_image}
    for key, derive in zip(KEYS, (_lanes, _group)):
        if numbers[key] is None:
            numbers[key] = before[key] or derive(config, limits, numbers[KEYS[0]])
            said.append(f"{key}={numbers[key]}" + (f" as in {where}" if before[key] else ""))
    lanes, group, rows = numbers.values()
    if rows is None and before[KEYS[1]] == group and (rows := before[KEYS[2]]):
        said.append(f"{KEYS[2]}={rows} as in {where}")
    if rows is None:
        samples = lengths()
        rows = rows_of(config, group, samples)
        names = ", ".join(f"{len(x.synthetic)} images of {x.name}" for x in samples)
        said.append(f"{KEYS[2]}={rows} from {names}")
    return with_numbers(config, lanes, group, rows), ", ".join(said)


def _numbers(config: Config) -> dict[str, Any]:
    return dict(zip(KEYS, (config.input.lanes, config.text.pack_group, config.text.pack_rows)))


def with_numbers(config: Config, lanes: int | None, group: int | None, rows: int | None) -> Config:
    """The config with these for `KEYS`."""
    return dataclasses.replace(
        config,
        input=dataclasses.replace(config.input, lanes=lanes),
        text=dataclasses.replace(config.text, pack_group=group, pack_rows=rows),
    )


def planned(config: Config, limits: Limits) -> tuple[Config, str]:
    """`resolve` without the dataset: by the lengths in the file beside its records, else by a guess.

    The guess is what the synthetic source makes: captions of 10-20 tokens, 0-5 descriptions of 4-12.
    """
    source, sets = config.input.source, config.input.sets
    samples = [text_lengths.read(x, config.model.text.tokenizer) for x in sets]
    if source != "records" or None in samples:
        (guess,) = synthetic.Synthetic().text_lengths(config)
        if source != "synthetic":
            name = f"a guess ({guess.name}), since the texts of {source} are not known here"
            guess = guess._replace(name=name)
        samples = [guess]
    return resolve(config, limits, lambda: [x for x in samples if x is not None])


def _lanes(config: Config, limits: Limits, _: None) -> int:
    """A number near `LANES`, with `LANE_IMAGES` images each, that suits 1, 2, 4, ... processes where possible."""
    batch = config.batch_size
    fewest = min(limits.shards.values(), default=batch)
    wanted = min(LANES, max(1, batch // LANE_IMAGES), fewest)
    group = config.text.pack_group or 1
    fits = [
        n
        for n in config_lib.divisors(batch)
        if n % limits.lanes == 0 and n <= fewest and batch // n % group == 0
    ]
    if not fits and limits.lanes > fewest:
        raise errors.UserError(
            f"input.lanes: got {fewest} shards in {min(limits.shards, key=limits.shards.__getitem__)!r}, but the processes"
            f" need {limits.lanes} lanes; rebuild it with grain-jax build --num-shards {limits.lanes}, or take fewer processes"
        )
    if not fits:
        images = batch // limits.lanes
        raise errors.UserError(
            f"text.pack_group: got {group}, but a lane has at most {images} of the {batch} images; expected a divisor"
            f" of that: {config_lib.flags_of('text.pack_group', config_lib.divisors(images), group)}"
        )

    def unlikeness(n: int) -> tuple:
        halves = math.gcd(n, 2 ** int(math.log2(wanted)))  # processes of 2, 4, ... that it serves
        return -halves, abs(math.log(n / wanted)), n

    return min(fits, key=unlikeness)


def _group(config: Config, limits: Limits, lanes: int) -> int:
    """The largest group, up to `LARGEST_GROUP`, that lies in one lane, one device and one micro-batch."""
    part = config.batch_size // (limits.parts * config.microbatches)
    whole = math.gcd(config.batch_size // lanes, part)
    return max(n for n in config_lib.divisors(whole) if n <= LARGEST_GROUP)


def rows_of(config: Config, group: int, lengths: Sequence[TextLengths]) -> int:
    """The smallest number of rows for `group` images at which at most `MISFITS` of the texts do not fit.

    Samples are drawn and grouped several times, with fixed seeds; the share holds in each draw.

    Args:
      config: `input` and `model.text` say how the texts of an image are chosen.
      group: images.
      lengths: for each of `config.input.sets`.
    """
    # Cut captions come many in one group, so their share needs many groups.
    images = max(_GROUPS * group, text_lengths.IMAGES // group * group)
    draws = [draw(config, lengths, images, np.random.default_rng(seed)) for seed in range(_DRAWS)]
    slots = [texts.slots() for texts in draws]
    shape = draws[0].descriptions.shape
    scores = np.broadcast_to(-np.arange(shape[1], dtype=np.float32), shape)
    row_length = config.row_length

    def suffice(rows: int) -> bool:
        """Whether at most MISFITS of the texts do not fit, in each draw."""
        for texts, in_slots in zip(draws, slots):
            layout = packing.pack(texts, scores, pack_group=group, rows=rows, row_length=row_length)
            misfits = np.count_nonzero(layout.misfits.slots())
            if misfits / max(np.count_nonzero(in_slots), 1) > MISFITS:
                return False
        return True

    tokens = np.concatenate([x.sum(axis=1) for x in slots])
    most = int(tokens.reshape(-1, group).sum(axis=1).max())
    captions = group * draws[0].captions.shape[1]
    # For two tokens of each caption.
    least = -(-captions // (row_length // packing.MIN_TEXT_LENGTH))
    # Bounds: after first fit no two rows could be joined, so they are more than half full on average; and the mean
    # number of tokens needs `low` rows.
    low = max(least, int(np.mean(tokens) * group / row_length))
    high = max(least, 2 * most // row_length + 1)
    return bisect.bisect_left(range(high), True, low, key=suffice)


def draw(
    config: Config, lengths: Sequence[TextLengths], images: int, rng: np.random.Generator
) -> packing.TextArrays:
    """Lengths of the texts of so many images, drawn as in training.

    If the lengths are of a part of the set, the draw is with replacement: draws differ as samples do.
    """
    longest = config.text_length
    weights = np.array([x.weight for x in config.input.sets[: len(lengths)]])
    ends = np.round(np.cumsum(weights) / weights.sum() * images).astype(int)
    of_sets = [
        _draw_set(config, x, number, rng) for x, number in zip(lengths, np.diff(ends, prepend=0), strict=True)
    ]
    mixed = rng.permutation(images)
    texts = [np.concatenate(parts)[mixed] for parts in zip(*of_sets)]
    clipped = [np.where(x, x.clip(packing.MIN_TEXT_LENGTH, longest), 0) for x in texts]
    return packing.TextArrays(*clipped)


def _draw_set(
    config: Config, lengths: TextLengths, number: int, rng: np.random.Generator
) -> packing.TextArrays:
    """Uncut lengths of the texts of `number` images of a set."""
    size, wanted = len(lengths.synthetic), config.input.captions_per_image
    if size < lengths.records:
        chosen = rng.integers(size, size=number)
    else:
        times = -(-number // size)
        chosen = np.concatenate([rng.permutation(size) for _ in range(times)])[:number]
    webs, synthetic_caption = lengths.captions[chosen], lengths.synthetic[chosen]
    count = (webs > 0).sum(axis=1)
    web = np.zeros(number, np.int32)
    if webs.shape[1]:
        web = webs[np.arange(number), (rng.random(number) * count).astype(int)]
    takes_synthetic = (synthetic_caption > 0) & (
        (rng.random(number) < config.input.synthetic_caption_rate) | (count == 0)
    )
    descriptions = lengths.descriptions[chosen]
    # A comma, and the description without its start and end token.
    best = config.input.descriptions_in_captions
    joined = np.maximum(descriptions - 1, 0)[:, : best or (0 if wanted == 1 else None)].sum(axis=1)
    if wanted == 1:
        caption = np.where(takes_synthetic, synthetic_caption, web)
        start = np.where((caption == 0) & (joined > 0), 1, caption)  # descriptions alone
        captions = (start + joined)[:, None]
    else:
        every = [web, synthetic_caption, np.where(joined, 1 + joined, 0)]
        captions = np.column_stack(every[:wanted])
    negatives = _draw_negatives(config, lengths, chosen, rng)
    return packing.TextArrays(captions, _fit(descriptions, negatives.shape[:2]), negatives)


def _fit(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The values [n, M, ...] in an array of `shape` [n, R] and their further axes; 0 behind them."""
    out = np.zeros((*shape, *values.shape[2:]), np.int32)
    out[:, : values.shape[1]] = values[:, : shape[1]]
    return out


def _draw_negatives(
    config: Config, lengths: TextLengths, chosen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Lengths int32 [images, R, H] of the negatives of the `chosen` images, drawn as transforms.Transform does."""
    most = config.input.negatives_per_region
    shape = len(chosen), config.input.max_regions
    if not most or not lengths.negatives.size:
        return np.zeros((*shape, most), np.int32)
    values = lengths.negatives[chosen][:, : shape[1]]
    count = (values > 0).sum(axis=2, keepdims=True)
    start = (rng.random((len(chosen), 1, 1)) * count).astype(int)
    column = np.arange(most)
    index = np.where(column < count, (start + column) % np.maximum(count, 1), 0)
    return _fit(np.where(column < count, np.take_along_axis(values, index, axis=2), 0), shape)
