"""How likely a text decoder finds texts, per token, and which of several candidates it prefers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grain_jax.evaluate import rates
from grain_jax.inference import text_decoder
from grain_jax.input_pipeline import tokenizer

TIE = 1e-3  # nats: log-likelihoods in float32, sums over dozens of tokens, differ by less from rounding


def token_counts(predictor: Any, texts: Sequence[str], task: str) -> np.ndarray:
    """How many tokens the text decoder predicts of each text, int [N]: its words and the end, where it is not cut.

    Args:
      predictor: a model with a text decoder.
      texts: N strings.
      task: "caption" or "describe".
    """
    library = tokenizer.of_tower(predictor.model.text, predictor.folder)
    given = text_decoder.Given(
        predictor.text_decoder.config, predictor.model, predictor.dtype, library.special_ids
    )
    words = text_decoder.sequences_of(library, given, task, [texts]).words
    return np.array([len(ids) for ids in words.ids], int) + words.is_whole


def per_token(name: str, log_p: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """`NAME_nll`, the mean negative log-likelihood of a token in nats, and `NAME_perplexity`, its exponential.

    Args:
      name: of the texts.
      log_p: [N], of whole texts, in nats.
      tokens: int [N], of each.
    """
    nll = -float(np.sum(log_p, dtype=np.float64)) / float(np.sum(tokens))
    return {f"{name}_nll": nll, f"{name}_perplexity": math.exp(min(nll, 700.0))}


def ranked(scores: np.ndarray, tie: float) -> dict[str, float]:
    """The right one of candidates, which is the first.

    Args:
      scores: [M, 1 + N], the higher the better.
      tie: scores nearer than this are equal.

    Returns: `top1`, with a 95% interval (`_low`, `_high`; ties count as if broken at random), `mean_rank` and
      `median_rank` (1 is best; ties count as lost).
    """
    rank = 1 + (scores[:, 1:] >= scores[:, :1] - tie).sum(axis=1)
    return {
        **rates.rate("top1", rates.topk_hits(scores, np.zeros(len(scores), int), 1, tie)),
        "mean_rank": float(rank.mean()),
        "median_rank": float(np.median(rank)),
    }
