"""The decoder as a loss term: it learns captions, and the boxes of phrases, beside the losses of GRAIN.

    c.loss.terms.words = {"term": "examples.captioner.term:Words", "weight": 1.0}

metrics.jsonl has it as `loss_words`, and the share of right tokens as `words/caption` and `words/box`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from examples.captioner.decoder import BOX, TextDecoder, Vocabulary
from grain_jax import config as config_lib
from grain_jax.config import keys
from grain_jax.core import boxes as boxes_lib
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the term."""

    width: int = keys.size(96)  # of a token
    depth: int = keys.layers(2)  # number of layers
    heads: int = keys.size(4)  # of attention; must divide width
    bins: int = keys.count(64, low=2, high=1000)  # parts of a side of the image
    phrases: int = keys.count(3, low=1, high=100)  # regions of an image that are drawn each step
    caption_length: int = keys.count(
        64, low=2, high=1000
    )  # most tokens of a caption; longer ones are left out
    phrase_length: int = keys.count(16, low=BOX, high=1000)  # most tokens of a phrase


def make_decoder(options: Options, model: config_lib.Model, dtype: str = "float32") -> TextDecoder:
    """The decoder of a term beside a model."""
    return TextDecoder(
        Vocabulary(model.text.vocab_size, options.bins),
        options.width,
        options.depth,
        options.heads,
        max(options.caption_length, options.phrase_length) + BOX,
        np.dtype(dtype),
    )


class Words(LocalTerm):
    """The mean cross-entropy of the predicted tokens: one caption, and `phrases` boxes, of each image."""

    Options: ClassVar[type] = Options

    @classmethod
    def faults(cls, options, config):
        """Sizes that do not fit together, and a run without regions."""
        faults = []
        if options.width % options.heads:
            faults.append(f"heads: got {options.heads}, expected a divisor of width {options.width}")
        if options.phrases > config.input.max_regions:
            most = config.input.max_regions
            faults.append(f"phrases: got {options.phrases}, expected at most input.max_regions {most}")
        return faults

    def setup(self):
        """The decoder has all parameters."""
        self.decoder = make_decoder(self.options, self.model, self.dtype)

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sums over the predicted tokens of each image."""
        batch, options, vocabulary = seen.batch, self.options, self.decoder.vocabulary
        keys = jax.vmap(jax.random.split)(seen.keys)  # for the caption, and for the phrases
        which = draw(keys[:, 0], batch.caption_mask, 1)
        texts, count = texts_of(batch, take(batch.caption_at, which), options.caption_length)
        count = jnp.where(take(batch.caption_mask, which), count, 0)
        of_captions = caption_sequences(vocabulary, texts, count)
        which = draw(keys[:, 1], batch.region_mask, options.phrases)
        texts, count = texts_of(batch, take(batch.description_at, which), options.phrase_length)
        count = jnp.where(take(batch.region_mask, which), count, 0)
        boxes = boxes_lib.cxcywh_to_xyxy(take(batch.region_boxes_cxcywh, which))
        of_boxes = box_sequences(vocabulary, texts, count, boxes)
        loss, total, measures = 0.0, 0.0, {}
        for name, (tokens, predicted) in {"caption": of_captions, "box": of_boxes}.items():
            logits = self.decoder(tokens[..., :-1], seen.tokens[:, seen.leading :])
            target = tokens[..., 1:, None]
            right = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
            sums = lambda x, predicted=predicted: jnp.where(predicted, x, 0.0).sum((1, 2))
            number = sums(jnp.ones_like(right))
            loss += sums(jax.nn.logsumexp(logits, axis=-1) - right)
            total += number
            measures[name] = PerImage(sums(right >= logits.max(-1)), number)
        return LocalOutput(PerImage(loss, total), measures)


def draw(keys: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """Indices of `count` items drawn from `mask` [B, n], the real ones first: int32 [B, count]."""
    order = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    return jax.lax.top_k(jnp.where(mask, order, -1.0), count)[1]


def take(x: jax.Array, which: jax.Array) -> jax.Array:
    """[B, n, ...] at the indices [B, k] -> [B, k, ...]."""
    return jnp.take_along_axis(x, which.reshape(*which.shape, *[1] * (x.ndim - 2)), axis=1)


def texts_of(batch, positions: jax.Array, longest: int) -> tuple[jax.Array, jax.Array]:
    """The texts whose last tokens lie at `positions`, [B, k, 2] of row and position, in the rows of a batch.

    Returns: their tokens, int32 [B, k, longest], and how many there are, int32 [B, k]; 0 for a longer text.
    """
    groups, _, length = batch.text_tokens.shape
    flat = lambda x: x.reshape(groups, -1)
    last = flat(positions[..., 0] * length + positions[..., 1])  # [G, B / G * k]
    count = jnp.take_along_axis(flat(batch.text_positions), last, axis=1) + 1
    index = last[..., None] - count[..., None] + 1 + jnp.arange(longest)
    index = jnp.clip(index, 0, flat(batch.text_tokens).shape[1] - 1)
    tokens = jnp.take_along_axis(flat(batch.text_tokens), flat(index), axis=1)
    count = jnp.where(count > longest, 0, count).reshape(positions.shape[:2])
    return tokens.reshape(*positions.shape[:2], longest), count


def caption_sequences(vocabulary, texts: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sequences int32 [B, k, n + 1] of words [B, k, n]; whether later tokens count, bool [B, k, n]."""
    first = jnp.full_like(texts[..., :1], vocabulary.caption)
    predicted = jnp.arange(texts.shape[-1]) < count[..., None]
    return jnp.concatenate([first, texts], axis=-1), predicted


def box_sequences(
    vocabulary, texts: jax.Array, count: jax.Array, boxes_xyxy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `caption_sequences`: the box follows the last word, and counts, [B, k, n + 5] and [B, k, n + 4]."""
    first = jnp.full_like(texts[..., :1], vocabulary.point)
    tokens = jnp.concatenate([first, texts, jnp.zeros_like(texts[..., :BOX])], axis=-1)
    part = jnp.arange(tokens.shape[-1]) - 1 - count[..., None]  # of the box
    box = jnp.take_along_axis(vocabulary.tokens_of(boxes_xyxy), jnp.clip(part, 0, BOX - 1), axis=-1)
    predicted = (part >= 0) & (part < BOX) & (count[..., None] > 0)
    return jnp.where(part >= 0, box, tokens), predicted[..., 1:]
