"""Linear probe and few-shot probe: how well a logistic regression on image embeddings classifies.

The protocol is that of CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", appendix A.3): scikit-learn's L-BFGS logistic regression of at most 1000 iterations; the strength of
the L2 penalty is searched on a validation part of the training set over 1e-6 ... 1e6, in steps of two decades, then
around the best value with a step that is halved four times (8 steps per decade); the final fit uses the validation
part too. A few-shot probe validates on up to 4 further images per class, as in CoOp (Zhou et al. 2022, "Learning to
Prompt for Vision-Language Models"), and its final fit uses only the shots.

The features are image embeddings after the projection, with unit length, as in the example in the README of
openai/CLIP. The tables of the CLIP paper use the features before the projection.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow, option, same_place
from grain_jax.core import errors
from grain_jax.evaluate.evaluators import LabelledImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.evaluate import encode, rates, test_sets
    from grain_jax.runtime import processes

TRAIN_SHARE = 0.7  # of the images of each class, where one set is split
VALIDATION_SHARE = 0.2  # of the training images of each class
VALIDATION_SHOTS = 4  # validation images per class of a few-shot probe, at most
MAX_ITERATIONS = 1000
# log10 of the values of C (1 / strength of the penalty) that the search tries first.
EXPONENTS = tuple(range(-6, 7, 2))
_HALVINGS = 4  # of the step of the search: from 2 decades to 1/8 decade
_SEED = 0  # of the splits
_TIE = 1e-9  # of the largest logit of an image: logits of float64 nearer than this are equal but for rounding
_ONE_THREAD = 10**9  # multiplications per iteration; fewer are faster by one thread than several


def _parse_shots(text: str) -> tuple[int, ...]:
    parts = ["0" if part == "all" else part for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"got {text!r}, expected images a class, or all, or several with commas between (1,5,all)"
        )
    return tuple(map(int, parts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(LabelledImages):
    """Classifies by a logistic regression on image embeddings, also of few shots."""

    example = "--images runs/aviary/seen --shots 1,5,all"
    kind: str = "linear_probe"
    # class folders to train on, or a split of the TFDS set; default: a share of each class of the images, or "train"
    train: str | None = option(None, "DIR")
    # training images a class, a probe each: 1,5,all; default all, which a config writes as 0
    shots: tuple[int, ...] = option((), "N,N", parse=_parse_shots)
    # draws of few shots, which are averaged
    seeds: int = option(5, "N", low=1, high=1000)

    @classmethod
    def rows(cls, numbers: Mapping[str, float]) -> Sequence[TableRow]:
        found = []
        for key in numbers:
            at, _, rate = key.rpartition("/")
            if at.startswith("shots_") and rate == "top1":
                number = at.removeprefix("shots_")
                name = f"few shots, {number} a class" if number != "all" else "all training images"
                pictures = "pictures", "pictures"
                found += [
                    TableRow(key, f"{name}, top-1", "chance", *pictures),
                    TableRow(f"{at}/top5", f"{name}, top-5", "chance_top5", *pictures),
                    TableRow(
                        f"{at}/mean_per_class", f"{name}, mean per class", "chance", *pictures
                    ),
                ]
        return found

    def faults(self) -> list[str]:
        found = super().faults()
        if any(shots < 0 for shots in self.shots):
            found.append(f"shots: got {self.shots}, expected at least 1 each, or 0 for all")
        return found

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.images, self.train

    def open_train(self) -> test_sets.TestSet | None:
        """The training images; None if `images` is to be split."""
        if self.tfds is not None:
            split = self.train or "train"
            if split == self.split:
                raise errors.UserError(
                    f"train: got the split {split!r}, which is the test's, expected another"
                )
            return self.open_other("", split)
        if self.train is None:
            return None
        if same_place(self.train, self.images):
            raise errors.UserError(
                f"train: got {self.train}, which are the test's images, expected others, or none to split them"
            )
        return self.open_other(self.train, self.split)

    def check(self) -> int:
        check_scikit_learn()
        test, train = self.open(), self.open_train()
        check(test, train, self.shots)
        return len(test) + (len(train) if train else 0)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Fits on the embeddings of training images and classifies the test images; each image is encoded once.

        Without training images, the test images are split: a random TRAIN_SHARE of each class (fixed seed) for training
        and the rest for the test.

        Returns: counts, `chance` (of top-1), `chance_top5`, and for each probe, under `shots_all` or `shots_N`:
          `top1`, `top5`, `mean_per_class` (of top-1), each with a 95% interval `_low`, `_high`; `per_class`; `C`; and
          `unconverged`, how many final fits stopped at MAX_ITERATIONS. `shots_all` also has `validation_top1`, and its
          intervals are those of `rates.of_classes`. The rates of `shots_N` are means over `draws` draws, with Student's
          interval of the mean (for one draw as `shots_all`); `C` and `top1_of_draws` are lists with a number per draw.
        """
        check_scikit_learn()
        unreadable: dict[str, str] = {}
        test, train = self.open(), self.open_train()
        tested = _encode(predictor, test, unreadable, context.batch_size)
        if train is None:
            learnt, tested = _split(tested, test.classes)
        else:
            learnt = _encode(predictor, train, unreadable, context.batch_size)
        classes = test.classes
        result = {
            "kind": "linear_probe",
            **rates.counts_of_classes(tested.label, list(classes)),
            "train_pictures": len(learnt.label),
            **encode.report_unreadable(unreadable),
        }
        numbers = list(dict.fromkeys(self.shots or (0,)))
        for number in numbers:
            check_shots(number, np.bincount(learnt.label, minlength=len(classes)), classes)
        # Only the first process fits; the others wait for its result.
        return result | processes.of_first(
            lambda: {
                f"shots_{number or 'all'}": _probe(learnt, tested, number, self.seeds, classes)
                for number in numbers
            }
        )


class Data(NamedTuple):
    """Image embeddings and their classes."""

    embed: np.ndarray  # float64 [N, D]
    label: np.ndarray  # int [N]


class Fitted(NamedTuple):
    """A regression, and the strength of its penalty."""

    model: Any  # scikit-learn's LogisticRegression
    c: float  # 1 / strength of the L2 penalty
    validation_top1: float  # with the same C, of the fit without the validation part
    converged: bool


def check(test: test_sets.TestSet, train: test_sets.TestSet | None, shots: Sequence[int]) -> None:
    """Raises errors.UserError where scikit-learn is missing, the classes differ, or a class has too few images."""
    check_scikit_learn()
    if train is not None and list(train.classes) != list(test.classes):
        only = [
            sorted(set(a) - set(b))
            for a, b in ((train.classes, test.classes), (test.classes, train.classes))
        ]
        raise errors.UserError(
            f"train: got other classes than the test's, expected the same; only in train:"
            f" {test_sets.listed(only[0]) or 'none'}; only in the test: {test_sets.listed(only[1]) or 'none'}"
        )
    # A TFDS set knows the sizes of its classes only once it is read.
    counts = getattr(train or test, "class_counts", None)
    if counts is not None:
        counts = counts if train else np.array([_part(n, TRAIN_SHARE) for n in counts])
        for number in shots or (0,):
            check_shots(number, counts, test.classes)


def check_scikit_learn() -> None:
    """Raises errors.UserError if scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise errors.UserError("linear_probe: needs scikit-learn: pip install 'grain_jax[probe]'")


def check_shots(number: int, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Raises errors.UserError if the training images, `counts` [C] per class, are too few for `number` shots per class.

    A few-shot probe needs one further image of each class, for validation. The probe on all images (`number` 0)
    needs two classes with images, one of them with two.
    """
    if number:
        few = [f"{name} ({n})" for name, n in zip(classes, counts) if n <= number]
        if few:
            raise errors.UserError(
                f"shots: got {number}, expected fewer than each class has training images, so that one is left"
                f" for validation; too few are of {test_sets.listed(few)}"
            )
    elif (counts > 0).sum() < 2 or counts.max() < 2:
        raise errors.UserError(
            "train: got too few images, expected at least two classes with images, one of them with two or more"
        )


def fit(learnt: Data, validation: Data, final: Data) -> Fitted:
    """Fits a regression on `final`, with the C whose regression on `learnt` is best on `validation`.

    The best C has the highest accuracy; ties go to the lowest log loss, then to the smallest C.
    """
    tried: dict[float, tuple[float, float, float]] = {}

    def rank(exponent: float) -> tuple[float, float, float]:
        if exponent not in tried:
            model, _ = _regression(learnt, 10.0**exponent)
            scores = _scores(model, validation.embed, int(validation.label.max()) + 1)
            loss = float(_log_loss(scores, validation.label))
            hits = _hits(scores, validation.label, 1)
            tried[exponent] = (float(hits.mean()), -loss, -exponent)
        return tried[exponent]

    step, best = float(EXPONENTS[1] - EXPONENTS[0]), float(max(EXPONENTS, key=rank))
    for _ in range(_HALVINGS):
        step /= 2
        around = [x for x in (best - step, best, best + step) if EXPONENTS[0] <= x <= EXPONENTS[-1]]
        best = max(around, key=rank)
    model, converged = _regression(final, 10.0**best)
    return Fitted(model, 10.0**best, tried[best][0], converged)


def hold_out(label: np.ndarray, seed: int) -> np.ndarray:
    """Which training images are for validation, bool [N]: VALIDATION_SHARE of each class, never a whole class."""
    held = np.zeros(len(label), bool)
    for own in _of_each_class(label, seed):
        held[own[: _part(len(own), VALIDATION_SHARE)]] = True
    return held


def draw(label: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, int, of `shots` images per class, and of up to VALIDATION_SHOTS further ones per class."""
    classes = _of_each_class(label, seed)
    more = min(shots, VALIDATION_SHOTS)
    chosen = np.concatenate([own[:shots] for own in classes])
    return chosen, np.concatenate([own[shots : shots + more] for own in classes])


def _of_each_class(label: np.ndarray, seed: int) -> list[np.ndarray]:
    """For each class the positions of its images, in a random order that no other class influences."""
    return [
        np.random.default_rng([seed, int(c)]).permutation(np.flatnonzero(label == c))
        for c in np.unique(label)
    ]


def _part(count: int, share: float) -> int:
    """So many of `count` images: one at least, and not all of them."""
    return min(count - 1, max(1, round(share * count)))


def _split(data: Data, classes: Sequence[str]) -> tuple[Data, Data]:
    """The training and the test images of one set. Raises errors.UserError where a class has a single image."""
    counts = np.bincount(data.label, minlength=len(classes))
    single = [name for name, n in zip(classes, counts) if n < 2]
    if single:
        raise errors.UserError(
            "train: got none, so that the images are split, expected two or more of each class that can be read;"
            f" too few are of {test_sets.listed(single)}"
        )
    train = np.zeros(len(data.label), bool)
    for own in _of_each_class(data.label, _SEED):
        train[own[: _part(len(own), TRAIN_SHARE)]] = True
    return _take(data, train), _take(data, ~train)


def _take(data: Data, which: np.ndarray) -> Data:
    return Data(data.embed[which], data.label[which])


def _encode(
    predictor: encode.Predictor,
    images: test_sets.TestSet,
    unreadable: dict[str, str],
    batch_size: int,
) -> Data:
    """The embeddings of the readable images of a set, on every process."""
    seen = encode.gather_images(
        predictor,
        images,
        label="linear probe",
        unreadable=unreadable,
        regions=False,
        batch_size=batch_size,
    )
    if seen.labels.min() < 0:
        raise errors.UserError("the set has images without a label, expected another split")
    return Data(seen.image_embed.astype(np.float64), seen.labels)


def _probe(learnt: Data, tested: Data, shots: int, seeds: int, classes: Sequence[str]) -> dict:
    """The part of the result about one number of shots; 0: all training images."""
    if not shots:
        held = hold_out(learnt.label, _SEED)
        fitted = fit(_take(learnt, ~held), _take(learnt, held), learnt)
        return {
            **_rates(fitted.model, tested, classes),
            "C": fitted.c,
            "validation_top1": fitted.validation_top1,
            "unconverged": int(not fitted.converged),
        }
    fits, found = [], []
    for seed in range(seeds):
        chosen, validation = (_take(learnt, x) for x in draw(learnt.label, shots, seed))
        fits.append(fit(chosen, validation, chosen))
        found.append(_rates(fits[-1].model, tested, classes))
    out: dict[str, Any] = {"draws": seeds}
    for key in ("top1", "top5", "mean_per_class"):
        values = np.array([rate[key] for rate in found])
        low, high = found[0][f"{key}_low"], found[0][f"{key}_high"]
        if seeds > 1:
            low, high = student_interval(values)
        out |= {key: float(values.mean()), f"{key}_low": low, f"{key}_high": high}
    out["per_class"] = {
        name: float(np.mean([rate["per_class"][name] for rate in found]))
        for name in found[0]["per_class"]
    }
    out["top1_of_draws"] = [rate["top1"] for rate in found]
    out["C"] = [fitted.c for fitted in fits]
    out["unconverged"] = sum(not fitted.converged for fitted in fits)
    return out


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95% interval of the mean of two or more shares, within [0, 1]."""
    from scipy import stats  # slow to import

    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def _rates(model: Any, tested: Data, classes: Sequence[str]) -> dict[str, Any]:
    """The rates of a regression on the test images, over all and for each class that has some."""
    scores = _scores(model, tested.embed, len(classes))
    top1, top5 = (_hits(scores, tested.label, k) for k in (1, 5))
    return rates.of_classes(top1, top5, tested.label, list(classes))


def _hits(scores: np.ndarray, label: np.ndarray, k: int) -> np.ndarray:
    """`rates.topk_hits` of logits [N, C], which are float64 and of any size: they tie relative to an image's largest."""
    largest = np.abs(scores, where=np.isfinite(scores), out=np.zeros_like(scores)).max(axis=1)
    right = label[:, None] == np.arange(scores.shape[1])
    return rates.topk_hits(scores, right, k, tie=_TIE * largest[:, None])


def _regression(data: Data, c: float) -> tuple[Any, bool]:
    """scikit-learn's regression at that C, and whether it has converged."""
    import threadpoolctl  # comes with scikit-learn
    from sklearn import exceptions, linear_model

    small = data.embed.size * len(np.unique(data.label)) < _ONE_THREAD
    model = linear_model.LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with threadpoolctl.threadpool_limits(1 if small else None), warnings.catch_warnings():
        # The result counts such fits.
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        model.fit(*data)
    return model, bool(model.n_iter_.max() < MAX_ITERATIONS)


def _scores(model: Any, embed: np.ndarray, classes: int) -> np.ndarray:
    """Logits float64 [N, C]; minus infinity for classes without training images."""
    found = model.decision_function(embed)
    if found.ndim == 1:  # of two classes: one logit, of the second against the first
        found = np.stack([np.zeros_like(found), found], axis=1)
    scores = np.full((len(embed), max(classes, int(model.classes_.max()) + 1)), -np.inf)
    scores[:, model.classes_] = found
    return scores


def _log_loss(scores: np.ndarray, label: np.ndarray) -> float:
    """Mean log loss of the images; infinite if a class of `label` had no training images."""
    top = scores.max(axis=1)
    total = np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top
    return float((total - scores[np.arange(len(label)), label]).mean())
