"""CIDEr-D: how much a caption says what the captions of annotators say of its image.

Source: Vedantam, Zitnick and Parikh 2015, "CIDEr: Consensus-based Image Description Evaluation", sections 3 and 4 (the
cosine of the tf-idf vectors of n-grams) and section 6 (CIDEr-D: clipped counts, and a Gaussian of the length).
"""

import collections
import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grain_jax.evaluate import encode

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the Gaussian, words
_FACTOR = 10.0
_IN_WORDS = "LMN"  # Unicode's categories: letters, marks, numbers
_JOINS = "-'"  # within a word

_Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text, in lower case: letters and digits, with hyphens and apostrophes between them."""
    kept = (
        char if unicodedata.category(char)[0] in _IN_WORDS or char in _JOINS else " "
        for char in encode.as_read(text)
    )
    return [word for piece in "".join(kept).split() if (word := piece.strip(_JOINS))]


def holds(text: Sequence[str], part: Sequence[str]) -> bool:
    """Whether the words `part`, one at least, stand in `text`, one after the other."""
    size, part = len(part), list(part)
    return bool(part) and any(list(text[i : i + size]) == part for i in range(len(text)))


class Scorer:
    """CIDEr-D of captions of images whose reference captions are known.

    Args:
      references: for each of N images the words of its captions, one at least. Of a single image every n-gram is in
        all images, and the score is 0.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]):
        in_images = collections.Counter()
        for own in references:
            in_images.update(set().union(*(_counts(text) for text in own)))
        self._in_images, self._log_images = in_images, math.log(max(len(references), 1))
        self._references = [[self._vector(text) for text in own] for own in references]

    def __call__(self, captions: Sequence[Sequence[str]]) -> np.ndarray:
        """The score of the words of a caption of each image, float64 [N], 0 to 10.

        The mean over the references and over n = 1 to 4 of the cosine of n-grams, times 10.
        """
        found = [
            sum(_similarity(caption, reference) for reference in own) / len(own)
            for own, caption in zip(self._references, map(self._vector, captions), strict=True)
        ]
        return _FACTOR * np.array(found, np.float64)

    def _vector(self, text: Sequence[str]) -> "_Vector":
        weighted: list[dict[_Gram, float]] = [{} for _ in range(ORDERS)]
        for gram, count in _counts(text).items():
            rarity = self._log_images - math.log(max(1, self._in_images[gram]))
            weighted[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(sum(x * x for x in each.values())) for each in weighted]
        return _Vector(weighted, norms, len(text))


class _Vector(NamedTuple):
    weighted: list[dict[_Gram, float]]  # of each order: n-gram -> tf-idf
    norms: list[float]
    length: int  # words


def _counts(text: Sequence[str]) -> collections.Counter[_Gram]:
    return collections.Counter(
        tuple(text[first : first + order])
        for order in range(1, ORDERS + 1)
        for first in range(len(text) - order + 1)
    )


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """The mean over the orders of the clipped cosine, times the Gaussian of the difference in length."""
    total = 0.0
    for ours, theirs, *norms in zip(
        caption.weighted, reference.weighted, caption.norms, reference.norms
    ):
        product = math.prod(norms)
        if product:
            common = (
                min(x, theirs[gram]) * theirs[gram] for gram, x in ours.items() if gram in theirs
            )
            total += sum(common) / product
    apart = caption.length - reference.length
    return total / ORDERS * math.exp(-(apart**2) / (2 * SIGMA**2))
