"""Zero-shot classification of a test set (docs/method.md, Zero-shot evaluation).

One pass over the images gives both protocols of the paper: class names in prompts, and class names with
descriptions. With `names=False` a class is the mean of the embeddings of its descriptions, without name or prompt:
for class names that mean nothing to the model, or descriptions that are whole sentences.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow, exists, expanduser, option
from grain_jax.core import errors
from grain_jax.evaluate.evaluators import Faults, LabelledImages, at_home

with epy.lazy_imports():
    import numpy as np
    from etils import epath

    from grain_jax.core import atomic, regular_file
    from grain_jax.evaluate import class_names, encode, rates, test_sets
    from grain_jax.inference import prompts, scores
    from grain_jax.runtime import processes

# How the similarities of regions and descriptions [Q, n_c] become the region score of a class.
REGION_ORDERS = (
    "queries",  # the paper: each query takes its best description, then the mean over queries
    "descriptions",  # each description takes its best query, then the mean over descriptions
)
BY_NAME = "by_name"  # key of the results by names alone, where there are descriptions too
BEST = 5  # classes that the prediction of an image lists


def _parse_alphas(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"got {text!r}, expected a number from 0 to 1, or several with commas between"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(LabelledImages):
    """Classifies a folder with one sub-folder a class."""

    example = "--images runs/aviary/unseen \\\n    --descriptions runs/aviary/unseen.json"
    writes_predictions = True
    kind: str = "zeroshot"
    # {class name: [description, ...]}: classes by descriptions too; default: by their names alone
    descriptions: str | None = option(None, "D.json")
    # share of the global score, 0 to 1, also several (0.5,1); default 1, with descriptions 1,0.5
    alphas: tuple[float, ...] = option((1.0, 0.5), "A", name="alpha", parse=_parse_alphas)
    # use the classes' names; without, a class is its descriptions alone (for names that mean nothing)
    names: bool = option(True)
    # what the region score is averaged over; queries is the paper's
    region_order: str = option(REGION_ORDERS[0], choices=REGION_ORDERS)
    # class features have unit length, as in CLIP; without, they are the mean, as in the paper's code
    unit_features: bool = option(False)
    # prompts, one a line, with {} for the name; default: inference/templates.txt
    templates: str | None = option(None, "FILE")

    @classmethod
    def of_flags(cls, **given: Any) -> typing.Self:
        entry = cls(**given)
        if "alphas" in given:  # asked for, so they count without descriptions, too
            check_alphas(entry.alphas, entry.descriptions, entry.names)
        return entry

    @classmethod
    def rows(cls, numbers: Mapping[str, float]) -> Sequence[TableRow]:
        found = []
        for key in numbers:  # in the order of `alphas`
            at, _, rate = key.rpartition("/")
            if at.startswith("alpha_") and rate == "top1":
                alpha = f"alpha {float(at.removeprefix('alpha_')):g}"
                found += [
                    TableRow(key, f"top-1, {alpha}", "chance", "pictures", "pictures"),
                    TableRow(
                        f"{at}/top5", f"top-5, {alpha}", "chance_top5", "pictures", "pictures"
                    ),
                ]
        return found

    def on_top(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of the first alpha."""
        alpha = self.shares[0]
        found = {"alpha": alpha, **result[f"alpha_{alpha}"]}
        return found | {"descriptions_file": self.descriptions}

    @property
    def needs_regions(self) -> bool:
        return bool(self.descriptions) and any(alpha < 1 for alpha in self.alphas)

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.descriptions, self.templates, self.classes

    @property
    def shares(self) -> Sequence[float]:
        """The alphas to evaluate; without descriptions 1 alone, or the alphas outside [0, 1], which `check` rejects."""
        if self.descriptions is not None:
            return self.alphas
        return [alpha for alpha in self.alphas if not 0 <= alpha <= 1] or (1.0,)

    def available(self) -> tuple[typing.Self, str]:
        found, _ = super().available()
        if self.missing != "skip" or self.descriptions is None:
            return found, ""
        path = expanduser(self.descriptions)
        if exists(path):
            return found, ""
        line = f"{path}: not there, expected descriptions of the classes"
        if not self.names:
            raise errors.MissingData(line)
        return dataclasses.replace(self, descriptions=None), f"{line}; evaluated by names alone"

    def check(self) -> int:
        attempt, described = Faults(), at_home(self.descriptions)
        test_set = attempt(self.open)
        if described is not None:
            known = (test_set.classes, test_set.stems) if test_set else ((), None)
            attempt(read_descriptions, described, *known, self.names)
        attempt(check_alphas, self.shares, described, self.names)
        if self.names:
            attempt(prompts.load_templates, at_home(self.templates))
        attempt.done()
        return len(test_set) if test_set else 0

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Classifies every image by alpha * global score + (1 - alpha) * region score.

        With `context.predictions`, the first process writes there one JSON object per image: its name, its right class,
        the five best classes.

        Returns: counts, `chance` (of top-1), `chance_top5`, and for each alpha, under `alpha_A`: `top1`, `top5`,
          `mean_per_class` (of top-1), each with a 95% interval `_low`, `_high`, and `per_class`. If there are names and
          descriptions, the global score uses both together; `by_name` has the same keys for names alone in the global
          score, at alpha 1 and at each other alpha. Ties count as if broken at random.
        """
        found = self.predict(predictor, context.batch_size)
        if context.predictions is not None and processes.process_info()[0] == 0:
            _write(epath.Path(context.predictions), found)
        classes = found.test_set.classes
        result = {
            "kind": "zeroshot",
            **rates.counts_of_classes(found.target, classes),
            **encode.report_unreadable(found.unreadable),
            "names": self.names,
            "descriptions": found.descriptions,
            "region_order": self.region_order,
            "unit_features": self.unit_features,
        }
        for key, scored in found.scored.items():
            way, _, alpha = key.rpartition("/")
            part = result.setdefault(way, {}) if way else result
            part[alpha] = rates.of_classes(scored.top1, scored.top5, found.target, classes)
        return result

    def predict(self, predictor: Any, batch_size: int = STANDALONE.batch_size) -> Predictions:
        """The best classes of each image, and whether they are right; `evaluate` averages them, and says what it raises."""
        test_set = self.open()
        classes = list(test_set.classes)
        described, alphas = None, check_alphas(self.shares, self.descriptions, self.names)
        if self.descriptions is not None:
            path = expanduser(self.descriptions)
            described = read_descriptions(path, classes, test_set.stems, self.names)
        templates = at_home(self.templates)
        texts, embeds = _class_embeddings(predictor, classes, described, self.names, templates)
        features = scores.class_features(texts, self.unit_features)
        ways = {f"alpha_{alpha}": (features, alpha) for alpha in alphas}
        if described is not None and self.names:
            texts, _ = _class_embeddings(predictor, classes, None, True, templates)
            alone = scores.class_features(texts, self.unit_features)
            for alpha in dict.fromkeys([1.0, *alphas]):
                ways[f"{BY_NAME}/alpha_{alpha}"] = alone, alpha

        with_regions = min(alphas) < 1
        unreadable: dict[str, str] = {}
        parts = []
        for batch in encode.encode_images(
            predictor,
            test_set,
            label="zero-shot",
            unreadable=unreadable,
            regions=with_regions,
            batch_size=batch_size,
        ):
            region_scores = None
            if with_regions and embeds is not None:
                region_scores = self.region_scores(batch.with_regions.embed, embeds)
            part = {"index": batch.index, "target": batch.labels}
            for key, (of_classes, alpha) in ways.items():
                global_scores = scores.global_scores(batch.image_embed, of_classes)
                combined = scores.combine(global_scores, region_scores, alpha)
                scored = _score(combined, batch.labels)
                part |= {f"{key} {name}": value for name, value in scored._asdict().items()}
            parts.append(part)
        found = processes.allgather(parts)
        if found["target"].min() < 0:
            raise errors.UserError(
                "the test set has images without a label, expected another split"
            )
        scored = {
            key: Scored(*(found[f"{key} {field}"] for field in Scored._fields)) for key in ways
        }
        count = sum(map(len, described)) if described else 0
        return Predictions(test_set, found["index"], found["target"], scored, unreadable, count)

    def region_scores(
        self, region_embed: np.ndarray, description_embeds: Sequence[np.ndarray]
    ) -> np.ndarray:
        """The region score of each class in the order `region_order`; arguments as of `description_scores`."""
        score = {"queries": scores.region_scores, "descriptions": description_scores}
        return score[self.region_order](region_embed, description_embeds)


class Scored(NamedTuple):
    """The results of one way of scoring, for each image."""

    top1: np.ndarray  # float64 [N], hits as `rates.topk_hits` returns them
    top5: np.ndarray  # float64 [N], the same among the five best
    best: np.ndarray  # int32 [N, at most BEST], the best classes, best first
    best_scores: np.ndarray  # float32 [N, at most BEST]


class Predictions(NamedTuple):
    """The right and the predicted classes of every readable image, in the order of the test set."""

    test_set: test_sets.TestSet
    index: np.ndarray  # int [N], positions in the test set
    target: np.ndarray  # int [N], the right classes
    scored: dict[str, Scored]  # keys: "alpha_0.5", "by_name/alpha_1.0"
    unreadable: dict[str, str]  # name of an image -> why it is left out
    descriptions: int  # how many all classes have together


def _score(combined: np.ndarray, target: np.ndarray) -> Scored:
    """The results of scores [B, C] for the right classes [B]."""
    right = target[:, None] == np.arange(combined.shape[1])
    right[target < 0, 0] = True  # no label: any class will do, since `predict` raises UserError
    best = np.argpartition(-combined, min(BEST, combined.shape[1]) - 1, axis=1)[:, :BEST]
    order = np.argsort(-np.take_along_axis(combined, best, axis=1), axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    return Scored(
        rates.topk_hits(combined, right, 1),
        rates.topk_hits(combined, right, 5),
        best.astype(np.int32),
        np.take_along_axis(combined, best, axis=1),
    )


def _write(path: epath.Path, found: Predictions) -> None:
    """Writes one line per image: {"picture", "class", "alpha_1.0": [[class, score], ...], ...}."""
    classes = found.test_set.classes
    lines = []
    for row, (index, target) in enumerate(zip(found.index, found.target)):
        line = {"picture": found.test_set.name(index), "class": classes[target]}
        for key, scored in found.scored.items():
            pairs = zip(scored.best[row].tolist(), scored.best_scores[row].tolist())
            line[key] = [[classes[i], score] for i, score in pairs]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic.write_text(path, "".join(lines))


def check_alphas(
    alphas: Sequence[float] | None, descriptions: epath.PathLike | None, names: bool
) -> list[float]:
    """The alphas to report (default 1, and 0.5 with descriptions). Raises errors.UserError."""
    if not alphas:
        alphas = (1.0,) if descriptions is None else (1.0, 0.5)
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise errors.UserError(f"alpha: got {alpha}, expected a number from 0 to 1")
    if descriptions is None and (not names or min(alphas) < 1):
        asked = f"alpha {min(alphas):g}" if names else "a test without class names"
        raise errors.UserError(f"descriptions: got nothing, expected a file (D.json) for {asked}")
    return [float(alpha) for alpha in alphas]


def description_scores(
    region_embed: np.ndarray, description_embeds: Sequence[np.ndarray]
) -> np.ndarray:
    """Region scores of the order "descriptions": the best query for each description, mean over descriptions.

    Args:
      region_embed: [B, Q, D].
      description_embeds: for each class the embeddings of its descriptions, [n_c, D], n_c >= 1.

    Returns: float32 [B, C]. docs/claim.md compares it with the order of the paper.
    """
    counts = np.array([len(embeds) for embeds in description_embeds])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    descriptions = scores.unit(np.concatenate(list(description_embeds)))  # [sum of n_c, D]
    best = (scores.unit(region_embed) @ descriptions.T).max(axis=1)  # [B, sum of n_c]
    return np.add.reduceat(best, starts, axis=-1) / counts.astype(np.float32)


def read_descriptions(
    path: epath.PathLike,
    classes: Sequence[str],
    stems: Sequence[str] | None = None,
    names: bool = True,
) -> list[list[str]]:
    """Reads the descriptions of each class from a file {"class name": ["description", ...]}.

    In names `_` stands for a space. If a file does not have a name as it is spelt, letters and digits are compared
    without case ("Black-footed albatross" matches "black_footed Albatross"), first those of the name, then those of
    the stem. Published files have empty lists for a few classes, which are then described by their name alone.

    Args:
      path: the file.
      classes: the class names.
      stems: a second name of each class (see `test_sets.TestSet`), or None.
      names: whether a class may have its name alone, with an empty list.

    Raises:
      errors.UserError: no such file, another format, one class under two names, or classes that have no description.
    """
    path = epath.Path(path)
    expected = 'descriptions of the classes, {"class name": ["description", ...]}'
    value = regular_file.read_json(path, dict[str, Any], expected)
    for name, texts in value.items():
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise errors.UserError(f"{path}: {name!r}: expected a list of texts that are not empty")
    spelt: dict[str, str] = {}
    for name in value:
        if (other := spelt.setdefault(test_sets.of_folder(name), name)) != name:
            raise errors.UserError(
                f"{path}: got {ascii(other)} and {ascii(name)}, which are one class (_ = space, Unicode NFC),"
                " expected it once"
            )
    known: dict[Any, list[str]] = {_letters(name): texts for name, texts in value.items()}
    known |= {name: value[key] for name, key in spelt.items()}
    found = [
        next((known[key] for key in (name, _letters(name), _letters(stem)) if key in known), None)
        for name, stem in zip(classes, stems or classes)
    ]
    missing = [n for n, texts in zip(classes, found) if texts is None or not (texts or names)]
    if missing:
        raise errors.UserError(f"{path}: no description of the classes {test_sets.listed(missing)}")
    return [texts for texts in found if texts is not None]


def _letters(name: str) -> tuple[str, ...]:
    """The letters and digits of a name, without case; a tuple, so that it equals no name as the key of a dict."""
    return tuple(re.findall(r"[^\W_]+", class_names.composed(name.casefold())))


def _class_embeddings(
    predictor: encode.Predictor,
    classes: Sequence[str],
    described: Sequence[Sequence[str]] | None,
    names: bool,
    templates: epath.PathLike | None,
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """For each class the embeddings of its texts, and of its descriptions (None without descriptions)."""
    embeds = None
    if described is not None:
        texts = [found or [name] for name, found in zip(classes, described)]
        embeds = encode.encode_texts(predictor, texts)
    if not names and embeds is not None:
        return embeds, embeds
    filled = prompts.load_templates(templates)
    texts = [
        prompts.class_texts(name, filled, described[i] or None if described else None)
        for i, name in enumerate(classes)
    ]
    return encode.encode_texts(predictor, texts), embeds
