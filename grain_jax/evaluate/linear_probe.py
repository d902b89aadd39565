"""Linear probe: how well a logistic regression on image embeddings classifies.

The protocol is CLIP's (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", appendix A.3), by scikit-learn's L-BFGS. The strength of the L2 penalty is searched on a part of
the training set over 1e-6 ... 1e6, in steps of two decades, then around the best value with a step that is
halved four times. The final fit uses that part too. The features are image embeddings after the projection,
with unit length, as in the README of openai/CLIP; the paper's tables use those before the projection.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from typing import Any, NamedTuple

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import expanduser, option
from grain_jax.evaluate.evaluators import LabelledImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.evaluate import encode, rates, test_sets
    from grain_jax.runtime import processes

TRAIN_SHARE = 0.7  # of the images of each class, where one set is split
VALIDATION_SHARE = 0.2  # of the training images of each class
MAX_ITERATIONS = 1000
EXPONENTS = tuple(range(-6, 7, 2))  # log10 of the first values of C, 1 / strength of the penalty
_HALVINGS = 4  # of the step of the search: from 2 decades to 1/8 decade
_SEED = 0  # of the splits
_TIE = 1e-9  # of the largest logit of an image: logits of float64 nearer than this are equal but for rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(LabelledImages):
    """Classifies by a logistic regression on image embeddings."""

    example = "--images runs/aviary/seen"
    kind: str = "linear_probe"
    train: str | None = option(None, "Class folders, or a TFDS split; default: a share of each class.", "DIR")

    def open_train(self) -> test_sets.TestSet | None:
        """The training images; None if `images` is to be split."""
        if self.tfds is None and self.train is None:
            return None
        train, test = self.train or "train", self.images if self.tfds is None else self.split
        if expanduser(train) == expanduser(test):
            expected = "expected others, or none to split them"
            raise errors.UserError(f"train: got {train}, which are the test's images, {expected}")
        return self.open_other(train, train)

    def check(self, model: Any = None) -> int:
        if importlib.util.find_spec("sklearn") is None:
            raise errors.UserError("linear_probe: needs scikit-learn: pip install 'grain_jax[probe]'")
        test, train = self.open(), self.open_train()
        if train is not None and list(train.classes) != list(test.classes):
            others = test_sets.listed(sorted({*train.classes} ^ {*test.classes}))
            raise errors.UserError(f"train: got other classes than the test's; only in one of them: {others}")
        return len(test) + (len(train) if train else 0)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Fits on embeddings of training images, or a TRAIN_SHARE of each class, and classifies the others.

        Returns: counts, `chance`, `chance_top5` and the rates of `rates.of_classes`; `C` and its
          `validation_top1`; and `converged`, False if the final fit stopped at MAX_ITERATIONS.
        """
        unreadable: dict[str, str] = {}

        def encoded(images: test_sets.TestSet) -> Data:
            seen = encode.gather_images(predictor, images, label="linear probe", batch_size=self.batch_size)
            unreadable.update(seen.unreadable)
            return Data(seen.image_embed.astype(np.float64), seen.labels)

        test, train = self.open(), self.open_train()
        classes, tested = list(test.classes), encoded(test)
        if train is None:
            chosen = hold_out(tested.label, TRAIN_SHARE)
            learnt, tested = tested.select(chosen), tested.select(~chosen)
        else:
            learnt = encoded(train)
        counts = np.bincount(learnt.label, minlength=len(classes))
        if (counts > 0).sum() < 2 or counts.max() < 2:
            raise errors.UserError("train: expected images of two classes, two of one of them")
        return {
            **rates.counts_of_classes(tested.label, classes),
            "train_images": len(learnt.label),
            **encode.report_unreadable(unreadable),
            **processes.of_first(lambda: _probe(learnt, tested, classes)),
        }


class Data(NamedTuple):
    """Image embeddings and their classes."""

    embed: np.ndarray  # float64 [N, D]
    label: np.ndarray  # int [N]

    def select(self, which: np.ndarray) -> Data:
        """The images for which `which` [N] is True."""
        return Data(self.embed[which], self.label[which])


def fit(learnt: Data, validation: Data, final: Data) -> tuple[Any, float]:
    """scikit-learn's regression on `final`, with the C whose regression on `learnt` is best on `validation`.

    The best C has the highest accuracy, returned too; ties go to the lowest log loss, then the smallest C.
    """
    from scipy import special  # slow to import

    @functools.cache
    def rank(exponent: float) -> tuple[float, float, float]:
        model = _regression(learnt, 10.0**exponent)
        scores = _scores(model, validation.embed, int(validation.label.max()) + 1)
        right = scores[np.arange(len(scores)), validation.label]  # -inf: no training images
        loss = float((special.logsumexp(scores, axis=1) - right).mean())
        return float(_hits(scores, validation.label, 1).mean()), -loss, -exponent

    step, best = float(EXPONENTS[1] - EXPONENTS[0]), float(max(EXPONENTS, key=rank))
    for _ in range(_HALVINGS):
        step /= 2
        around = [x for x in (best - step, best, best + step) if EXPONENTS[0] <= x <= EXPONENTS[-1]]
        best = max(around, key=rank)
    return _regression(final, 10.0**best), rank(best)[0]


def hold_out(label: np.ndarray, share: float) -> np.ndarray:
    """A share of the images of each class, never all of them, and one at least if there are two; bool [N]."""
    chosen = np.zeros(len(label), bool)
    for c in np.unique(label):  # in a random order that no other class influences
        images = np.random.default_rng([_SEED, int(c)]).permutation(np.flatnonzero(label == c))
        chosen[images[: min(len(images) - 1, max(1, round(share * len(images))))]] = True
    return chosen


def _probe(learnt: Data, tested: Data, classes: list[str]) -> dict[str, Any]:
    """The part of the result about the regression."""
    validation = hold_out(learnt.label, VALIDATION_SHARE)
    model, validation_top1 = fit(learnt.select(~validation), learnt.select(validation), learnt)
    scores = _scores(model, tested.embed, len(classes))
    top1, top5 = (_hits(scores, tested.label, k) for k in (1, 5))
    return {
        **rates.of_classes(top1, top5, tested.label, classes),
        "C": model.C,
        "validation_top1": validation_top1,
        "converged": bool(model.n_iter_.max() < MAX_ITERATIONS),
    }


def _hits(scores: np.ndarray, label: np.ndarray, k: int) -> np.ndarray:
    """`rates.topk_hits` of float64 logits [N, C] of any size: they tie relative to an image's largest."""
    largest = np.abs(scores, where=np.isfinite(scores), out=np.zeros_like(scores)).max(axis=1)
    return rates.topk_hits(scores, label, k, tie=_TIE * largest[:, None])


def _regression(data: Data, c: float) -> Any:
    """scikit-learn's regression at that C."""
    from sklearn import exceptions, linear_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # `converged` says so
        return linear_model.LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(*data)


def _scores(model: Any, embed: np.ndarray, classes: int) -> np.ndarray:
    """Logits float64 [N, C]; minus infinity for classes without training images."""
    logits = model.decision_function(embed)
    if logits.ndim == 1:  # two classes have one logit, the second against the first
        logits = np.stack([np.zeros_like(logits), logits], axis=1)
    scores = np.full((len(embed), max(classes, int(model.classes_.max()) + 1)), -np.inf)
    scores[:, model.classes_] = logits
    return scores
