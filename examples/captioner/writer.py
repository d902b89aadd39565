"""Uses a trained decoder: captions of images, and boxes of phrases, by the most probable token each time."""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from etils import epath

from examples.captioner import term
from examples.captioner.decoder import BOX
from grain_jax import config as config_lib
from grain_jax.checkpoint import files
from grain_jax.core import errors
from grain_jax.losses import total
from grain_jax.models import grain
from grain_jax.train import forward

BATCH = 64  # sequences at a time


class Writer:
    """The model of a run with its decoder.

    Args:
      predictor: `grain_jax.load(RUN)` of a run whose `loss.terms` have `Words`.

    Raises:
      UserError: it is no such run.
    """

    def __init__(self, predictor: Any):
        step = epath.Path(predictor.folder or "")
        if not (step / "state").exists():
            raise errors.UserError(f"{predictor!r}: expected the model of a training run")
        run = step.parent.parent  # RUN/checkpoints/STEP
        config = config_lib.from_dict(json.loads((run / "config.json").read_text()))
        entries = total.local_entries(config.loss)
        name = next((name for name, entry in entries.items() if entry.cls is term.Words), None)
        if name is None:
            raise errors.UserError(f"{predictor.folder}: has no loss term {term.__name__}:Words")
        which = "ema_params" if files.metadata_of(step).get("ema_params") else "params"
        stored = files.read_arrays(step, only=which)[which]
        self.predictor = predictor
        self.options: Any = entries[name].options
        self.decoder = term.make_decoder(self.options, config.model)
        self.params = stored[forward.TERMS][name]["decoder"]
        text = config.model.text
        self.end = text.vocab_size - 1 if text.end_id is None else text.end_id
        self._tokenizer = tokenizers.Tokenizer.from_file(str(text.tokenizer))
        self._generate = jax.jit(
            functools.partial(generate, self.decoder), static_argnames=("count", "low", "high")
        )
        tower = grain.GRAIN(self.predictor.model)
        leading = grain.leading_tokens(config.model)
        self._tokens_of = jax.jit(
            lambda params, image: tower.apply({"params": params}, image, method="image_tokens")[:, leading:]
        )

    def image_tokens(self, images: Iterable[Any]) -> jax.Array:
        """PIL images -> the tokens that the decoder sees, [B, N, E]."""
        pixels = np.stack([self.predictor.preprocess(image) for image in images])
        parts = [pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH)]
        return jnp.concatenate([self._tokens_of(self.predictor.params, part) for part in parts])

    def captions(self, image_tokens: jax.Array) -> list[str]:
        """The caption of each image."""
        vocabulary, most = self.decoder.vocabulary, self.options.caption_length
        start = np.full((len(image_tokens), 1), vocabulary.caption, np.int32)
        written = self._continue(start, np.ones(len(start)), image_tokens, most, 0, vocabulary.words)
        texts = []
        for ids in written.tolist():
            ids = ids[: ids.index(self.end)] if self.end in ids else ids
            texts.append(self._tokenizer.decode(ids))
        return texts

    def boxes(self, image_tokens: jax.Array, phrases: Sequence[str]) -> np.ndarray:
        """The box of a phrase in each image, xyxy in [0, 1], float32 [B, 4].

        Raises:
          UserError: a phrase is longer than any in training.
        """
        vocabulary, most = self.decoder.vocabulary, self.options.phrase_length
        start = np.zeros((len(phrases), 1 + most), np.int32)
        start[:, 0] = vocabulary.point
        count = np.zeros(len(phrases), np.int32)
        for row, phrase in enumerate(phrases):
            ids = self.predictor.tokenizer(phrase).tolist()
            ids = ids[: ids.index(self.end) + 1]
            if len(ids) > most:
                got = f"{phrase!r}: got {len(ids)} tokens"
                raise errors.UserError(f"{got}, expected at most phrase_length={most}")
            start[row, 1 : 1 + len(ids)], count[row] = ids, 1 + len(ids)
        ends = vocabulary.first_bin, vocabulary.first_bin + vocabulary.bins
        written = self._continue(start, count, image_tokens, BOX, *ends)
        return vocabulary.boxes_of(written).astype(np.float32)

    def _continue(self, start, count, image_tokens, number, low, high) -> np.ndarray:
        """`generate`, so many sequences at a time."""
        parts = []
        for i in range(0, len(start), BATCH):
            part = slice(i, i + BATCH)
            arrays = start[part], count[part].astype(np.int32), image_tokens[part]
            parts.append(self._generate(self.params, *arrays, count=number, low=low, high=high))
        return np.concatenate(parts)


def generate(decoder, params, start, lengths, image, *, count: int, low: int, high: int):
    """The tokens that follow, each the most probable one of the ids from `low` to `high` - 1.

    Args:
      decoder: the module.
      params: of the decoder.
      start: int32 [B, n], the first tokens of each sequence, with any padding.
      lengths: int32 [B], how many they are.
      image: [B, N, E].
      count: how many tokens are wanted.
      low: the first id that may follow.
      high: the id behind the last one.

    Returns: int32 [B, count].
    """
    rows = jnp.arange(len(start))
    tokens = jnp.pad(start, ((0, 0), (0, count)))

    def step(i, tokens):
        logits = decoder.apply({"params": params}, tokens[:, None, :-1], image)[:, 0]
        following = low + logits[rows, lengths + i - 1, low:high].argmax(-1)
        return tokens.at[rows, lengths + i].set(following.astype(tokens.dtype))

    tokens = jax.lax.fori_loop(0, count, step, tokens)
    return jnp.take_along_axis(tokens, lengths[:, None] + jnp.arange(count), axis=1)
