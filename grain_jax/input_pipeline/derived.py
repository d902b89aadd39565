"""Numbers for the keys that a config leaves open: `input.lanes`, `text.pack_group`, `text.pack_rows` set to None.

Lanes and group follow from batch, micro-batches and devices. The rows follow from the lengths of the texts of
the data set, so that at most `MISFITS` of them are dropped or cut. config.json and the checkpoints of a run hold the
numbers, and a resumed run takes them from there. Needs neither JAX nor TensorFlow.
"""

import bisect
import dataclasses
import functools
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


class DerivedError(errors.UserError):
    """No number is possible; a line per fault, with the flags that make one possible."""


class Place(NamedTuple):
    """The devices, processes and data that the numbers must suit.

    Attributes:
      parts: shards of the batch (data x fsdp).
      lanes: the number of lanes is a multiple of this (`sharding.lanes_needed`).
      shards: name of each data set -> number of its shards; {}: not known, or any number of lanes will do.
    """

    parts: int = 1
    lanes: int = 1
    shards: Mapping[str, int] = {}


class Rows(NamedTuple):
    """A number of rows per group, and the texts that do not fit into it."""

    rows: int
    misfits: float  # share of the texts that are dropped or cut
    too_long: float  # share of the captions that are longer than a row


def is_open(config: Config) -> bool:
    """Whether the config has a number left to derive."""
    return None in _numbers(config).values()


def resolve(
    config: Config,
    place: Place,
    lengths: Callable[[], Sequence[TextLengths]],
    stored: Config | None = None,
    where: str = "",
) -> tuple[Config, str]:
    """The config with numbers, and a line that says which were derived from what ("": none).

    Args:
      config: of the user.
      place: of the run.
      lengths: gives the text lengths of each data set; called where rows must be derived.
      stored: the config of the checkpoint that the run resumes from; its numbers are taken.
      where: that checkpoint, in words.

    Raises:
      DerivedError: no number is possible.
    """
    if not is_open(config):
        return config, ""
    before = dict.fromkeys(KEYS)  # those of the checkpoint
    # One of another batch size is another run, which `checkpoint.check_same_run` refuses.
    if stored and stored.batch_size == config.batch_size:
        before = _numbers(stored)
    found, derived, taken = _numbers(config), [], []
    if not config.text.packing:
        found |= {KEYS[1]: 1, KEYS[2]: config.input.texts_per_image}
    for key, way in zip(KEYS, (_lanes, _group)):
        if found[key] is None:
            found[key] = before[key] or way(config, place, found[KEYS[0]])
            (taken if before[key] else derived).append(f"{key}={found[key]}")
    lanes, group, rows = found.values()
    source = ""
    if rows is None and before[KEYS[1]] == group and (rows := before[KEYS[2]]):
        taken.append(f"{KEYS[2]}={rows}")
    if rows is None:
        of = lengths()
        rows, misfits, too_long = rows_of(config, group, of)
        derived = [word for word in derived if not word.startswith(KEYS[1])]
        derived.append(f"{KEYS[2]}={rows} for groups of {group}")
        names = ", ".join(f"{len(one.synthetic)} images of {one.name}" for one in of)
        source = f": from {names}; {_percent(misfits)} of their texts do not fit"
        if too_long:
            source += (
                f", {_percent(too_long)} of their captions are cut to {config.text_length} tokens"
            )
    line = ", ".join(derived) + source
    if taken:
        line = "; ".join(filter(None, (f"{', '.join(taken)}: as in {where}", line)))
    return with_numbers(config, lanes, group, rows), line


def _numbers(config: Config) -> dict[str, Any]:
    return dict(zip(KEYS, (config.input.lanes, config.text.pack_group, config.text.pack_rows)))


def with_numbers(config: Config, lanes: int | None, group: int | None, rows: int | None) -> Config:
    """The config with these for `KEYS`."""
    return dataclasses.replace(
        config,
        input=dataclasses.replace(config.input, lanes=lanes),
        text=dataclasses.replace(config.text, pack_group=group, pack_rows=rows),
    )


def planned(config: Config, place: Place) -> tuple[Config, str]:
    """`resolve` without the data set: by the lengths in the file beside its records, else by a guess.

    The guess is that of the synthetic source: captions of 10-20 tokens, 0-5 descriptions of 4-12.
    """
    source, sets = config.input.source, config.input.sets
    read = [text_lengths.read(one, config.model.text.tokenizer) for one in sets]
    found = [lengths for lengths in read if lengths is not None]
    if source != "records" or len(found) < len(sets):
        found = [synthetic.text_lengths(config)]
        if source != "synthetic":
            names = ", ".join(repr(one.name) for one in sets) if source == "records" else source
            guess = f"a guess ({found[0].name}), since the texts of {names} are not known here"
            found = [found[0]._replace(name=guess)]
    return resolve(config, place, lambda: found)


def _lanes(config: Config, place: Place, _: None) -> int:
    """A number near `LANES`, with `LANE_IMAGES` images each, that suits 1, 2, 4, ... processes where possible."""
    batch = config.batch_size
    fewest = min(place.shards.values(), default=batch)
    wanted = min(LANES, max(1, batch // LANE_IMAGES), fewest)
    group = config.text.pack_group or 1
    fits = [
        n
        for n in config_lib.divisors(batch)
        if n % place.lanes == 0 and n <= fewest and batch // n % group == 0
    ]
    if not fits and place.lanes > fewest:
        name = min(place.shards, key=lambda name: place.shards[name])
        raise DerivedError(
            f"input.lanes: {name!r} has {fewest} shards, but the processes that batch_size {batch} is"
            f" spread over need {place.lanes} lanes; rebuild it with grain-jax build --num-shards"
            f" {place.lanes}, or take fewer processes"
        )
    if not fits:
        raise DerivedError(
            f"text.pack_group: got {group}, but a lane has at most {batch // place.lanes} of the"
            f" {batch} images; expected a divisor of that:"
            f" {flags('text.pack_group', batch // place.lanes, group)}"
        )

    def unlikeness(n: int) -> tuple:
        halves = math.gcd(n, 2 ** int(math.log2(wanted)))  # processes of 2, 4, ... that it serves
        return -halves, abs(math.log(n / wanted)), n

    return min(fits, key=unlikeness)


def _group(config: Config, place: Place, lanes: int) -> int:
    """The largest group, up to `LARGEST_GROUP`, that lies in one lane, one device and one micro-batch."""
    part = config.batch_size // (place.parts * config.microbatches)
    whole = math.gcd(config.batch_size // lanes, part)
    return max(n for n in config_lib.divisors(whole) if n <= LARGEST_GROUP)


def flags(key: str, number: int, wanted: int) -> str:
    """The flags that set `key` to the divisors of `number` on both sides of `wanted`."""
    return config_lib.flags_of(key, config_lib.divisors(number), wanted)


def rows_of(config: Config, group: int, lengths: Sequence[TextLengths]) -> Rows:
    """The smallest number of rows for `group` images at which at most `MISFITS` of the texts do not fit.

    Samples are drawn and grouped several times, with fixed seeds; the share holds in each draw.

    Args:
      config: `input` and `model.text` say how the texts of an image are chosen.
      group: images.
      lengths: of each of `config.input.sets`.
    """
    # Cut captions come many in one group, so their share needs many groups.
    images = max(_GROUPS * group, text_lengths.IMAGES // group * group)
    row_length = config.row_length
    draws, too_long = [], []
    for seed in range(_DRAWS):
        texts, cut = draw(config, lengths, images, np.random.default_rng(seed))
        draws.append(texts)
        too_long.append(cut)
    rows, misfits = smallest_rows(draws, group, row_length, MISFITS)
    return Rows(rows, misfits, float(np.mean(too_long)))


def draw(
    config: Config, lengths: Sequence[TextLengths], images: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], float]:
    """Texts of so many images, drawn as in training: arguments of `packing.pack`, and the share of cut captions.

    Where the lengths are of a part of the set, the draw is with replacement: draws differ as samples do.
    """
    regions, longest = config.input.max_regions, config.text_length
    wanted = config.input.captions_per_image
    weights = np.array([one.weight for one in config.input.sets[: len(lengths)]])
    ends = np.round(np.cumsum(weights) / weights.sum() * images).astype(int)
    captions, descriptions, negatives = [], [], []
    for one, number in zip(lengths, np.diff(ends, prepend=0), strict=True):
        size = len(one.synthetic)
        if size < one.records:
            chosen = rng.integers(size, size=number)
        else:
            times = -(-number // size)
            chosen = np.concatenate([rng.permutation(size) for _ in range(times)])[:number]
        web, synthetic_caption = one.captions[chosen], one.synthetic[chosen]
        count = (web > 0).sum(axis=1)
        of_web = np.zeros(number, np.int32)
        if web.shape[1]:
            which = (rng.random(number) * count).astype(int)
            of_web = web[np.arange(number), which]
        takes_synthetic = (synthetic_caption > 0) & (
            (rng.random(number) < config.input.synthetic_caption_rate) | (count == 0)
        )
        of_regions = np.zeros((number, max(regions, one.descriptions.shape[1])), np.int32)
        of_regions[:, : one.descriptions.shape[1]] = one.descriptions[chosen]
        # A comma, and the description without its start and end token.
        added = np.maximum(of_regions - 1, 0)
        best = config.input.descriptions_in_captions
        if wanted == 1:
            caption = np.where(takes_synthetic, synthetic_caption, of_web)
            joined = added[:, :best].sum(axis=1)
            first = np.where((caption == 0) & (joined > 0), 1, caption)  # descriptions alone
            captions.append((first + joined)[:, None])
        else:
            joined = added[:, : best or None].sum(axis=1)
            every = [of_web, synthetic_caption, np.where(joined, 1 + joined, 0)]
            captions.append(np.column_stack(every[:wanted]))
        descriptions.append(of_regions[:, :regions])
        if config.input.negatives_per_region:
            negatives.append(_negatives(config, one, chosen, rng))
    mixed = rng.permutation(images)
    caption = np.concatenate(captions)[mixed]
    description = np.concatenate(descriptions)[mixed]
    texts = dict(
        caption_lengths=np.where(caption, caption.clip(packing.MIN_TEXT_LENGTH, longest), 0),
        description_lengths=description.clip(packing.MIN_TEXT_LENGTH, longest),
        region_mask=description > 0,
        region_scores=np.broadcast_to(-np.arange(regions, dtype=np.float32), description.shape),
    )
    if negatives:
        texts["negative_lengths"] = np.concatenate(negatives)[mixed]
    return texts, float((caption > longest).sum() / max((caption > 0).sum(), 1))


def _negatives(
    config: Config, lengths: TextLengths, chosen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Lengths int32 [images, R, H] of the negatives of the `chosen` images, drawn as transforms.Transform does."""
    regions, most = config.input.max_regions, config.input.negatives_per_region
    drawn = np.zeros((len(chosen), regions, most), np.int32)
    if lengths.negatives is None or not lengths.negatives.size:
        return drawn
    found = lengths.negatives[chosen][:, :regions]
    count = (found > 0).sum(axis=2, keepdims=True)
    start = (rng.random((len(chosen), 1, 1)) * count).astype(int)
    column = np.arange(most)
    place = np.where(column < count, (start + column) % np.maximum(count, 1), 0)
    there = np.where(column < count, np.take_along_axis(found, place, axis=2), 0)
    drawn[:, : found.shape[1]] = there
    longest = config.text_length
    return np.where(drawn, drawn.clip(packing.MIN_TEXT_LENGTH, longest), 0)


def smallest_rows(
    draws: Sequence[Mapping[str, np.ndarray]], group: int, row_length: int, misfits: float
) -> tuple[int, float]:
    """The smallest number of rows at which at most that share of the texts does not fit, in each of the draws.

    Args:
      draws: texts as arguments of `packing.pack`.
      group: images.
      row_length: tokens a row.
      misfits: share of the texts, dropped or cut.

    Returns:
      The rows, and the share of the texts of all draws that does not fit.
    """

    @functools.cache
    def shares(rows: int) -> list[float]:
        out = []
        for texts in draws:
            layout = packing.pack(**texts, pack_group=group, rows=rows, row_length=row_length)
            number = np.count_nonzero(texts["caption_lengths"]) + int(texts["region_mask"].sum())
            number += np.count_nonzero(texts.get("negative_lengths", ()))
            out.append((layout.texts_dropped + layout.captions_cut) / max(number, 1))
        return out

    tokens = np.concatenate(
        [
            t["caption_lengths"].sum(axis=1)
            + np.where(t["region_mask"], t["description_lengths"], 0).sum(axis=1)
            + (t["negative_lengths"].sum(axis=(1, 2)) if "negative_lengths" in t else 0)
            for t in draws
        ]
    )
    most = int(tokens.reshape(-1, group).sum(axis=1).max())
    captions = group * draws[0]["caption_lengths"].shape[1]
    # For two tokens of each caption.
    least = -(-captions // (row_length // packing.MIN_TEXT_LENGTH))
    # Bounds: after first fit no two rows could be one, so they are more than half full on average; and the mean
    # number of tokens needs `low` rows.
    low = max(least, int(np.mean(tokens) * group / row_length))
    high = max(least, 2 * most // row_length + 1)
    rows = bisect.bisect_left(range(high), True, low, key=lambda n: max(shares(n)) <= misfits)
    return rows, float(np.mean(shares(rows)))


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"
