"""Numbers for the keys that a config leaves open (None): `input.lanes`, `text.pack_group`, `text.pack_rows`.

Lanes and group follow from batch, micro-batches and devices, the rows from the tokens of a sample of the
dataset. config.json and the checkpoints of a run hold the numbers, and a resumed run takes them from there.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import Config
from grain_jax.core import errors
from grain_jax.input_pipeline import packing, record_folders, sources, synthetic

KEYS = ("input.lanes", "text.pack_group", "text.pack_rows")
LANES = 16  # unless the processes, shards or batch ask for another number
LANE_IMAGES = 16  # images of a lane in a small batch: smaller packing groups leave much padding
LARGEST_GROUP = 64  # images; larger groups save little more padding
SAMPLE, SAMPLE_BATCH = 2000, 50  # images in all and at a time
DEVIATIONS = 3.0  # a group may have so many more tokens than the mean group


class Limits(NamedTuple):
    """The devices, processes and data that the numbers must suit."""

    parts: int = 1  # shards of the batch (data x fsdp)
    lanes: int = 1  # the number of lanes is a multiple of this (`sharding.lanes_needed`)
    # Name of each dataset -> number of its shards; {}: not known, or any number of lanes will do.
    shards: Mapping[str, int] = {}


class TextSample(NamedTuple):
    """The texts of some images of a dataset, as training gets them."""

    tokens: np.ndarray  # int [N], of all texts of an image
    texts: int  # of all images
    has_captions: bool
    has_regions: bool


def is_open(config: Config) -> bool:
    """Whether the config has a number left to derive."""
    return None in _numbers(config).values()


def resolve(
    config: Config, limits: Limits, source: sources.DataSource, stored: Config | None = None, where: str = ""
) -> tuple[Config, str]:
    """The config with numbers, and what to print: those derived, and a warning of loss terms without data.

    Args:
      config: of the user.
      limits: of the run.
      source: the dataset; read if rows must be derived.
      stored: the config of the checkpoint that the run resumes from; its numbers are taken.
      where: that checkpoint, in words.

    Raises:
      UserError: no number is possible, or a record cannot be read.
    """
    if not is_open(config):
        return config, ""
    before = dict.fromkeys(KEYS)  # the numbers in the checkpoint
    # Another batch size makes another run, which `checkpoint.check_same_run` refuses.
    if stored and stored.batch_size == config.batch_size:
        before = _numbers(stored)
    numbers, said, warning = _numbers(config), [], ""
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
        texts = sample(with_numbers(config, lanes, None, None), source)
        rows = rows_of(config, group, texts)
        images = min(
            len(texts.tokens), source.num_examples(config)
        )  # of a small set each comes several times
        tokens = f"{texts.tokens.mean():.1f} +- {texts.tokens.std():.1f} tokens"
        said.append(f"{KEYS[2]}={rows} for {tokens} per image, in {images} images")
        warning = _terms_without_data(config, texts, images)
    return with_numbers(config, lanes, group, rows), ", ".join(said) + warning


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
    """`resolve` where the dataset may be missing: its texts are then those of the synthetic source."""
    kind, source, guess = config.input.source, synthetic.Synthetic(), ""
    try:
        if kind != "records" or all(map(record_folders.folder_of, config.input.sets)):
            source = sources.open_source(config)
    except errors.UserError:
        pass
    config, said = resolve(config, limits, source)
    if said and isinstance(source, synthetic.Synthetic) and kind != "synthetic":
        guess = f" (a guess: the texts of {kind} are not known here)"
    return config, said + guess


def _lanes(config: Config, limits: Limits, _: None) -> int:
    """A number near `LANES`, of `LANE_IMAGES` images each, that suits 1, 2, 4, ... processes if possible."""
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
        name = min(limits.shards, key=limits.shards.__getitem__)
        raise errors.UserError(
            f"input.lanes: got {fewest} shards in {name!r}, but the processes need {limits.lanes} lanes;"
            f" rebuild it with grain-jax build --num-shards {limits.lanes}, or take fewer processes"
        )
    if not fits:
        images = batch // limits.lanes
        raise errors.UserError(
            f"text.pack_group: got {group}, but a lane has at most {images} of the {batch} images; expected a"
            f" divisor of that: {config_lib.flags_of('text.pack_group', config_lib.divisors(images), group)}"
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


def sample(config: Config, source: sources.DataSource) -> TextSample:
    """The texts of `SAMPLE` images of the first lane, whatever the seed of the run. Raises UserError."""
    lanes = sources.num_lanes(config)
    small = lanes * min(config.batch_size // lanes, SAMPLE_BATCH)
    text = dataclasses.replace(config.text, packing=False)
    unpacked = dataclasses.replace(config, seed=0, batch_size=small, text=text)
    tokens, texts, captions, regions = [], 0, False, False
    for batch in source.batches(unpacked, lanes=(0,)):
        tokens += (batch.text_segments > 0).sum(axis=(1, 2)).tolist()
        texts += int(batch.text_counts[:, 0].sum())
        captions |= batch.caption_mask.any()
        regions |= batch.region_mask.any()
        if len(tokens) >= SAMPLE:
            break
    return TextSample(np.array(tokens), texts, bool(captions), bool(regions))


def rows_of(config: Config, group: int, texts: TextSample) -> int:
    """Rows for the texts of `group` images: `DEVIATIONS` more tokens than the mean.

    A row of many texts is filled but for a quarter of a mean text, a row of few holds whole mean texts.
    """
    row_length = config.row_length
    mean_text = max(texts.tokens.sum() / max(texts.texts, 1), packing.MIN_TEXT_LENGTH)
    whole = row_length // mean_text
    filled = row_length - mean_text / 4 if whole >= 4 else whole * mean_text
    tokens = group * texts.tokens.mean() + DEVIATIONS * math.sqrt(group) * texts.tokens.std()
    # For two tokens of each caption.
    least = -(-group * config.input.captions_per_image // (row_length // packing.MIN_TEXT_LENGTH))
    return max(least, math.ceil(tokens / filled))


def _terms_without_data(config: Config, texts: TextSample, images: int) -> str:
    """A line that names the keys of loss terms whose data no image of the sample has; "" if there is none."""
    terms = () if texts.has_captions else ("image_caption",)
    if not texts.has_regions:
        terms += ("box", "region_description", "image_description", "box_description")
    if not (keys := [f"--config.loss.{name}=0" for name in terms if getattr(config.loss, name)]):
        return ""
    lacking = " or ".join(["captions"] * (not texts.has_captions) + ["boxes"] * (not texts.has_regions))
    advice = f"terms that need them stay 0: set {' '.join(keys)}"
    return f"\nwarning: no {lacking} in {images} images; {advice}"
