"""How many pixels of each class were taken for which class, and the numbers of segmentation that follow from it.

The counts are integers and sums over images, so they depend neither on the order of the images nor on the number of
processes. They take the same memory for any number of images, and so does the interval. It is a Poisson bootstrap
(Chamandy et al. 2012, "Estimating uncertainty for massive data streams"). In each of DRAWS replicates an image counts as
often as a Poisson number of mean 1 says. That number depends on the position of the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grain_jax.runtime import processes

DRAWS = 200
LEAST_IMAGES = 5  # for an interval over images
_SEED = 18


def counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix of an image, int64 [C, C], rows by the true class; negative classes do not count."""
    known = truth >= 0
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def parts(matrix: np.ndarray) -> np.ndarray:
    """Confusion matrices [..., C, C] -> [..., 3, C]: right, true and predicted pixels of each class."""
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    return np.stack([right, matrix.sum(-1), matrix.sum(-2)], axis=-2)


def miou(pixels: np.ndarray) -> np.ndarray:
    """`parts` [..., 3, C] -> the mean IoU over the classes whose union is not empty; NaN if all are empty."""
    right, true, predicted = np.moveaxis(np.asarray(pixels, np.float64), -2, 0)
    return _mean_share(right, true + predicted - right)


def accuracy(pixels: np.ndarray) -> np.ndarray:
    """`parts` [..., 3, C] -> the share of right pixels; NaN if there is no pixel."""
    return _ratio(pixels[..., 0, :].sum(-1), pixels[..., 1, :].sum(-1))


def class_accuracy(pixels: np.ndarray) -> np.ndarray:
    """`parts` [..., 3, C] -> the mean over the true classes of their shares of right pixels."""
    right, true, _ = np.moveaxis(np.asarray(pixels, np.float64), -2, 0)
    return _mean_share(right, true)


def _mean_share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The mean over the classes [..., C] with pixels."""
    exists = whole > 0
    return _ratio((part / np.maximum(whole, 1)).sum(-1, where=exists), exists.sum(-1))


def _ratio(a: Any, b: Any) -> np.ndarray:
    b = np.asarray(b, np.float64)
    return np.where(b > 0, np.asarray(a, np.float64) / np.maximum(b, 1), np.nan)


class Confusion:
    """The confusion matrix int64 [C, C] of a set, image by image, rows by the true class.

    `images` is the number of images that have a pixel that counts.
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
        """`miou`, `pixel_accuracy` and `mean_class_accuracy`, and their values for a uniform guess.

        The first three have 95% intervals if there are LEAST_IMAGES or more. Nobody guesses the class `without`.
        """
        pixels, out = parts(self.matrix), {}
        ways = dict(miou=miou, pixel_accuracy=accuracy, mean_class_accuracy=class_accuracy)
        for name, measure in ways.items():
            out[name] = value = float(measure(pixels))
            if self.images >= LEAST_IMAGES:
                low, high = np.nanpercentile(measure(self._drawn), (2.5, 97.5))
                out |= {f"{name}_low": min(low, value), f"{name}_high": max(high, value)}
        true = pixels[1].astype(np.float64)
        guess = np.ones(len(true))  # the chance of each class
        if without is not None:
            guess[without] = 0
        guess /= guess.sum()
        union = true * (1 - guess) + true.sum() * guess
        exists = union > 0
        return out | {
            "chance_miou": float((true * guess)[exists] @ (1 / union[exists]) / exists.sum()),
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
