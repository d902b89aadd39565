"""The text decoder learns captions, descriptions of boxes, and boxes of descriptions (docs/method.md, Local terms)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import fields
from grain_jax.core import schema
from grain_jax.losses import boxes as boxes_lib
from grain_jax.losses import vocabulary
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen
from grain_jax.models import placement, text_decoder, towers
from grain_jax.models.text_decoder import TASKS


@dataclasses.dataclass(frozen=True)
class Options(config_lib.TextDecoder):
    """The keys of the term."""

    # Consecutive images of a batch of which one is read each step, drawn anew; it divides the images of a device's
    # micro-batch. 1: all.
    group: int = fields.count(2, low=1, high=4096)
    # Regions of an image that are drawn each step, each read in both directions.
    regions: int = fields.count(2, high=1000)
    caption_weight: float = fields.key(1.0, low=0)  # of a word of a caption
    describe_weight: float = fields.key(1.0, low=0)  # of a word of the description of a box
    point_weight: float = fields.key(1.0, low=0)  # of a coordinate of the box of a description
    # Whether a word or coordinate of a region weighs as much as the score of its annotation; it needs input.region_scores.
    by_score: bool = fields.key(False)
    # All drawn boxes of an image in one sequence that predicts them and their descriptions, in the place of a sequence a box
    # that is given; a coordinate has the weight of `point`.
    together: bool = fields.key(False)
    # Share of the captions that are predicted all at once, without their words (CapPa).
    parallel_rate: float = fields.key(0.0, low=0, high=1)
    stop_gradient: bool = fields.key(False)  # whether the image tower learns nothing from it
    dropout: float = fields.key(0.1, low=0, high=0.99)  # rate, in the layers of the decoder
    label_smoothing: float = fields.key(0.0, low=0, high=0.99)  # share of the vocabulary's mean

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the tasks, in their order."""
        return self.caption_weight, self.describe_weight, self.point_weight

    @property
    def sizes(self) -> config_lib.TextDecoder:
        """The keys of the decoder itself."""
        names = (field.name for field in dataclasses.fields(config_lib.TextDecoder))
        return config_lib.TextDecoder(**{name: getattr(self, name) for name in names})


class TextDecoderTerm(LocalTerm):
    """The decoder of LocCa (Wan et al. 2024, arXiv 2403.19596), beside the contrastive losses as in SigLIP 2.

    The loss is the weighted mean of the cross-entropies of all predicted tokens. One image of a group has a row, with one
    of its captions and `regions` drawn regions; a sequence that does not fit into it is left out.
    Measures, for each task, `TASK` and `TASK_accuracy`, the mean cross-entropy and the share of tokens with the highest
    logit (with `together` also of the predicted `boxes`; of captions in parallel as `caption_parallel`); `filled`, the
    share of the row that is no padding; `left_out`, that of the sequences; `predicted`, the tokens that are predicted of
    an image; `needed`, the positions that all sequences of an image would take.
    """

    Options: ClassVar[type] = Options
    any_grid: ClassVar[bool] = True

    @classmethod
    def group(cls, options: Any) -> int:
        """See `Options.group`."""
        return options.group

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """What it misses: patches, something to predict, sizes that fit."""
        found: list[str] = []
        sizes: Any = options.beside(config.model)
        if sizes.width % sizes.heads:
            found.append(
                f"heads: got {sizes.heads}, expected a divisor of the width {sizes.width} (None: the text tower's)"
            )
        if towers.image_tower(config.model.image).pooled:
            got = f"model.image.tower: got {config.model.image.tower}, which pools its tokens"
            found.append(f"{got}, expected one with patches")
        regions = min(options.regions, config.input.max_regions)
        if not any(options.weights[: None if regions else 1]):
            without = "" if regions else " without regions (regions, input.max_regions)"
            found.append(
                f"caption_weight: got 0 as all weights{without}, expected a task with a weight"
            )
        if options.by_score and not config.input.region_scores:
            found.append(
                "by_score: got True, expected input.region_scores=True, which reads scores"
            )
        if options.by_score and options.together:
            found.append(
                "by_score: got True with together, expected False for boxes in one sequence"
            )
        specials = options.leading_specials, options.trailing_specials
        if config.model.text.tokenizer == "clip" and specials != (1, 1):
            found.append(f"leading_specials, trailing_specials: got {specials}, expected (1, 1)")
        return found

    @classmethod
    def advice(cls, options: Any, measures: Mapping[str, float]) -> str:
        """What to set where much of the rows is padding, or much is left out."""
        filled, left_out, needed = (measures[x] for x in ("filled", "left_out", "needed"))
        # A third more than the mean, since images differ.
        enough = max(32, 32 * math.ceil(needed * 4 / 3 / 32))
        too_short = left_out > 0.05 and enough > options.row_length
        too_long = filled < 0.4 and left_out < 0.01 and enough < options.row_length
        most = options.most_predictions
        too_few = left_out > 0.05 and most < options.row_length
        too_few = too_few and measures["predicted"] > 0.75 * most
        if too_few and not too_short:
            return (
                f"{left_out:.0%} of the sequences do not fit into predictions={most}, of which"
                f" {measures['predicted']:.0f} are used on average: more, or None, would fit"
            )
        if not (too_short or too_long):
            return ""
        return (
            f"{left_out:.0%} of the sequences do not fit into rows of {options.row_length} tokens, which are"
            f" {filled:.0%} full; an image has {needed:.0f} on average: row_length={enough}"
            f"{' with more predictions' if too_few else ''} would fit"
        )

    def setup(self):
        sizes = self.options.sizes.beside(self.model)
        self.decoder = text_decoder.TextDecoder(
            sizes,
            text_decoder.vocabulary(sizes, self.model),
            np.dtype(self.dtype),
            self.model.attention,
            self.remat,
            self.options.dropout,
        )

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sums of each image."""
        options: Options = self.options
        drawn = draw(options, self.decoder.vocabulary, seen)
        patches = seen.tokens[:, seen.leading :]
        if options.stop_gradient:
            patches = jax.lax.stop_gradient(patches)
        keys = _folded(seen.keys, _DROPOUT) if options.dropout else None
        is_read, places = jnp.ones(len(patches), bool), seen.places
        if options.group > 1:
            is_read, read = _of_groups(seen.keys, options.group)
            drawn, patches, keys, places = jax.tree.map(read, (drawn, patches, keys, places))
        rows, score = drawn.rows, drawn.score
        features = self.decoder.features(patches, rows, keys, places)
        if options.most_predictions < options.row_length:  # these alone
            at = jnp.argsort(~rows.predicted, axis=1, stable=True)[:, : options.most_predictions]
            features = jnp.take_along_axis(features, at[..., None], axis=1)
            read = lambda x: jnp.take_along_axis(x, at, axis=1)
            read_of = {name: read(getattr(rows, name)) for name in ("targets", "predicted", "task")}
            rows = rows._replace(**read_of)
            score = None if score is None else read(score)
        found = vocabulary.cross_entropy(
            features,
            self.decoder.head,
            rows.targets,
            size=self.decoder.vocabulary.size,
            smoothing=options.label_smoothing,
            mesh=placement.mesh(),
            batch_axes=placement.batch_axes(),
        )
        of_task = rows.predicted & (
            rows.task == np.arange(len(_MEASURED))[:, None, None]
        )  # [n, B, T]
        count = of_task.sum(2).astype(jnp.float32)  # [n, B]
        sums = lambda x: jnp.where(of_task, x, 0).sum(2)
        weights = [*options.weights, options.point_weight, options.caption_weight]
        weights = np.array(weights, np.float32)[:, None]
        loss = sums(found.loss)
        right = sums((found.own >= found.highest).astype(jnp.float32))
        measures = {}
        is_there = [True] * len(TASKS) + [options.together, options.parallel_rate > 0]
        for i, task in enumerate(_MEASURED):
            if not is_there[i]:
                continue
            measures[task] = PerImage(loss[i], count[i])
            measures[f"{task}_accuracy"] = PerImage(right[i], count[i])
        filled = (rows.segments > 0).mean(1)
        measures["predicted"] = PerImage(count.sum(0), jnp.ones_like(filled))
        measures["filled"] = PerImage(filled, jnp.ones_like(filled))
        measures["left_out"] = PerImage(drawn.count - drawn.kept, drawn.count)
        measures["needed"] = PerImage(drawn.needed, jnp.ones_like(filled))
        if score is not None:
            loss, count = sums(found.loss * score), sums(score)
        of_read = LocalOutput(PerImage((weights * loss).sum(0), (weights * count).sum(0)), measures)
        return jax.tree.map(lambda x: _of_all(x, is_read), of_read)


class Drawn(NamedTuple):
    """What the decoder reads of each image in a step."""

    rows: text_decoder.Rows
    count: (
        jax.Array
    )  # int32 [B], the sequences that there are; with `together` each of its boxes is one
    kept: jax.Array  # int32 [B], those that fit into the row
    needed: jax.Array  # int32 [B], positions that all of them take
    score: jax.Array | None = None  # float32 [B, T], with `by_score`; 1 of captions


_CAPTION, _REGIONS, _PARALLEL, _DROPOUT, _READ = range(5)  # what is drawn
# What is measured: `together` predicts boxes, too; captions that are predicted all at once have a number of their own.
_MEASURED = (*TASKS, "boxes", "caption_parallel")


def draw(options: Options, words: text_decoder.Vocabulary, seen: Seen) -> Drawn:
    """The rows of the images, a function of their keys: a caption, then region after region in both directions."""
    batch, parts = seen.batch, []
    length, specials = options.row_length, options.leading_specials + options.trailing_specials
    # Of words; their end is predicted, too.
    most = max(1, min(batch.text_tokens.shape[-1] - specials, options.most_predictions - 1))

    def text(at, real, others):
        fits = min(most, length - others)
        return text_decoder.text_of_batch(
            *(batch.text_tokens, batch.text_positions, at, real, options, fits),
            longest=seen.text_length,
        )

    if options.caption_weight:
        which = _chosen(_folded(seen.keys, _CAPTION), batch.caption_mask, 1)
        at, real = _take(batch.caption_at, which), _take(batch.caption_mask, which)
        found = text(at, real, 1)
        is_whole = found.is_whole & ~_take(_may_be_cut(batch), which)
        parts.append(text_decoder.caption(words, found._replace(is_whole=is_whole)))
    captions = len(parts)
    regions, boxed = min(options.regions, batch.region_mask.shape[1]), None
    of_sequences = jnp.ones((len(batch.region_mask), captions))
    if regions:
        which = _chosen(_folded(seen.keys, _REGIONS), batch.region_mask, regions)
        at, real = _take(batch.description_at, which), _take(batch.region_mask, which)
        boxes = boxes_lib.cxcywh_to_xyxy(_take(batch.region_boxes_cxcywh, which))
        found = text(at, real, 1 + text_decoder.BOX + options.together)
        both = []
        if options.describe_weight and options.together:
            # All positions of it predict, as those of the caption do.
            space = min(length, options.most_predictions) * jnp.ones(len(at), jnp.int32)
            space -= sum(part.length[:, 0] for part in parts)
            one, boxed = text_decoder.together(words, boxes, found, length, space)
            parts.append(one)
        elif options.describe_weight:
            both.append(text_decoder.describe(words, boxes, found))
        if options.point_weight:
            both.append(text_decoder.point(words, found, boxes))
        # Of a row that is too short, the last regions are left out.
        parts += [part.of(i) for i in range(regions) for part in both]
        if options.by_score:
            own = jnp.repeat(_take(batch.region_scores, which), len(both), axis=1)
            of_sequences = jnp.concatenate([of_sequences, own], axis=1)
    rows = text_decoder.pack(parts, length, predictions=options.most_predictions)
    lengths = jnp.concatenate([part.length for part in parts], axis=1)
    count, kept, needed = (lengths > 0).sum(1), rows.kept.sum(1), lengths.sum(1)
    if boxed is not None:
        # Each of its boxes counts, not the sequence itself.
        itself = lengths[:, captions]
        count += real.sum(1) - (itself > 0)
        kept += boxed.sum(1) - rows.kept[:, captions]
        every = jnp.where(real, text_decoder.BOX + 1 + found.count, 0).sum(1)
        needed += jnp.where(real.any(1), 1 + every, 0) - itself
        is_box = (rows.segments == captions + 1) & (rows.targets >= words.first_bin)
        rows = rows._replace(task=jnp.where(is_box, _MEASURED.index("boxes"), rows.task))
    score = None
    if options.by_score:
        of_sequences = jnp.pad(of_sequences, ((0, 0), (1, 0)))
        score = jnp.take_along_axis(of_sequences, rows.segments, axis=1)
    if not (options.parallel_rate and options.caption_weight):
        return Drawn(rows, count, kept, needed, score)
    is_parallel = (
        jax.vmap(jax.random.uniform)(_folded(seen.keys, _PARALLEL)) < options.parallel_rate
    )
    in_parallel = is_parallel[:, None] & (rows.segments == 1)
    # Attention stays causal: more of these, which all are the same, would tell the length of the caption alone.
    tokens = jnp.where(in_parallel, words.mask, rows.tokens)
    task = jnp.where(in_parallel, _MEASURED.index("caption_parallel"), rows.task)
    return Drawn(rows._replace(tokens=tokens, task=task), count, kept, needed, score)


def _may_be_cut(batch: schema.Batch) -> jax.Array:
    """The captions that packing may have cut, bool [B, C]; one that was as long by itself cannot be told from these.

    `grain_jax/input_pipeline/packing.py:pack` cuts the longest of a group to one length, once its regions are dropped.
    """
    groups = len(batch.text_tokens)
    of_group = lambda x: jnp.reshape(x, (groups, math.prod(x.shape) // groups))  # also of none
    at = batch.caption_at[..., 0] * batch.text_tokens.shape[2] + batch.caption_at[..., 1]
    last = jnp.take_along_axis(of_group(batch.text_positions), of_group(at), axis=1)
    last = jnp.where(of_group(batch.caption_mask), last, 0)
    overflowed = (batch.texts_dropped > 0) & ~of_group(batch.region_mask).any(1)
    is_longest = last == last.max(1, keepdims=True)
    return (is_longest & overflowed[:, None]).reshape(batch.caption_mask.shape)


def _chosen(keys: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """Places of `count` items drawn without replacement among those of `mask` [B, n], the real ones first, int32 [B, count]."""
    order = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    return jax.lax.top_k(jnp.where(mask, order, -1.0), count)[1]


def _take(x: jax.Array, which: jax.Array) -> jax.Array:
    """[B, n, ...] at the places [B, k] -> [B, k, ...]."""
    return jnp.take_along_axis(x, which.reshape(*which.shape, *[1] * (x.ndim - 2)), axis=1)


def _of_groups(keys: jax.Array, group: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """(which images are read, bool [B], one of each group; the function that takes their part of an array [B, ...])."""
    order = jax.vmap(jax.random.uniform)(_folded(keys, _READ)).reshape(-1, group)
    which = order.argmax(1)[:, None]
    read = lambda x: _take(x.reshape(-1, group, *x.shape[1:]), which)[:, 0]
    return (np.arange(group) == which).reshape(-1), read


def _of_all(x: jax.Array, is_read: jax.Array) -> jax.Array:
    """Sums [b] of the images that are read -> [B], 0 of others."""
    return jnp.where(is_read, jnp.repeat(x, len(is_read) // len(x)), 0)


def _folded(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
