"""How many pixels of each class were taken for which class, and the numbers of segmentation that follow from it.

The counts are integers and sums over images: they do not depend on the order of the images or on who has which, and
they take the same memory for any number of images. So does the interval, a Poisson bootstrap (Chamandy et al. 2012,
"Estimating uncertainty for massive data streams"): in each of DRAWS replicates an image counts as often as a Poisson
number of mean 1 says, a function of its position in the set.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grain_jax.runtime import processes

DRAWS = 200
LEAST_IMAGES = 5  # for an interval over images
_SEED = 18


def counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix of an image, int64 [C, C], rows by the true class.

    Args:
      truth: int, positions of classes; negative numbers do not count.
      predicted: int of that shape, positions of classes.
      classes: C.
    """
    known = truth >= 0
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def parts(matrix: np.ndarray) -> np.ndarray:
    """Confusion matrices [..., C, C] -> [..., 3, C]: right, true and predicted pixels of each class."""
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    return np.stack([right, matrix.sum(-1), matrix.sum(-2)], axis=-2)


def miou(found: np.ndarray) -> np.ndarray:
    """The mean IoU over the classes whose union is not empty, of `parts` [..., 3, C]; NaN where all are."""
    right, true, predicted = np.moveaxis(np.asarray(found, np.float64), -2, 0)
    union = true + predicted - right
    there = union > 0
    total = (right / np.maximum(union, 1)).sum(-1, where=there)
    return _ratio(total, there.sum(-1))


def accuracy(found: np.ndarray) -> np.ndarray:
    """The share of right pixels, of `parts` [..., 3, C]; NaN where there is none."""
    return _ratio(found[..., 0, :].sum(-1), found[..., 1, :].sum(-1))


def class_accuracy(found: np.ndarray) -> np.ndarray:
    """The mean over the true classes of their shares of right pixels, of `parts` [..., 3, C]."""
    right, true, _ = np.moveaxis(np.asarray(found, np.float64), -2, 0)
    there = true > 0
    return _ratio((right / np.maximum(true, 1)).sum(-1, where=there), there.sum(-1))


def _ratio(a: Any, b: Any) -> np.ndarray:
    b = np.asarray(b, np.float64)
    return np.where(b > 0, np.asarray(a, np.float64) / np.maximum(b, 1), np.nan)


class Confusion:
    """The confusion matrix of a set, image by image.

    Args:
      classes: their number C.

    Attributes:
      matrix: int64 [C, C], rows by the true class.
      images: how many were added that have a pixel that counts.
    """

    def __init__(self, classes: int):
        self.matrix = np.zeros((classes, classes), np.int64)
        self._drawn = np.zeros((DRAWS, 3, classes), np.int64)
        self.images = 0

    def add(self, position: int, matrix: np.ndarray) -> None:
        """Adds the matrix of an image, of that position in the set."""
        self.matrix += matrix
        self.images += int(matrix.any())
        weights = np.random.default_rng((_SEED, position)).poisson(1, DRAWS)
        self._drawn += weights[:, None, None] * parts(matrix)

    def gathered(self) -> Confusion:
        """The sum over all processes, the same on each; all of them call it."""
        parts = {"matrix": self.matrix, "drawn": self._drawn, "images": np.array(self.images)}
        sums = processes.allgather({key: part[None] for key, part in parts.items()})
        out = Confusion(len(self.matrix))
        out.matrix, out._drawn = sums["matrix"].sum(0), sums["drawn"].sum(0)
        out.images = int(sums["images"].sum())
        return out

    def measures(self, without: int | None = None) -> dict[str, float]:
        """`miou`, `pixel_accuracy`, `mean_class_accuracy`, and those of a guess that is uniform.

        The first three have 95% intervals if there are LEAST_IMAGES or more: of one image all draws are alike.

        Args:
          without: a class that no pixel gets, so that nobody guesses it; None: none.
        """
        own, out = parts(self.matrix), {}
        ways = dict(miou=miou, pixel_accuracy=accuracy, mean_class_accuracy=class_accuracy)
        for name, measure in ways.items():
            out[name] = value = float(measure(own))
            if self.images >= LEAST_IMAGES:
                low, high = np.nanpercentile(measure(self._drawn), (2.5, 97.5))
                out |= {f"{name}_low": min(low, value), f"{name}_high": max(high, value)}
        true = own[1].astype(np.float64)
        guess = np.ones(len(true))  # the chance of each class to be guessed
        if without is not None:
            guess[without] = 0
        guess /= guess.sum()
        union = true * (1 - guess) + true.sum() * guess
        there = union > 0
        return out | {
            "chance_miou": float((true * guess)[there] @ (1 / union[there]) / there.sum()),
            "chance_pixel_accuracy": float(true @ guess / true.sum()),
        }

    def per_class(self, names: list[str]) -> dict[str, dict[str, float | int | None]]:
        """Name -> `iou` and `accuracy`, None where the class has no such pixels, and its true `pixels`."""
        right, true, predicted = parts(self.matrix).tolist()
        share = lambda a, b: a / b if b else None
        return {
            name: {"iou": share(r, t + p - r), "accuracy": share(r, t), "pixels": t}
            for name, r, t, p in zip(names, right, true, predicted, strict=True)
        }
