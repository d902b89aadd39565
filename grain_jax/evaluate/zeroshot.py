"""Zero-shot classification of a test set (docs/method.md, Zero-shot evaluation).

One pass over the images gives both protocols of the paper: class names in prompts, and class names with
descriptions. With `names=False` a class is the mean of the embeddings of its descriptions.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax import config
from grain_jax.cli import flags
from grain_jax.core import errors
from grain_jax.evaluate.base import option
from grain_jax.evaluate.evaluators import LabelledImages, WithPrompts, faults_of

with epy.lazy_imports():
    import numpy as np
    from etils import epath

    from grain_jax.core import regular_file
    from grain_jax.evaluate import class_names, encode, rates, test_sets
    from grain_jax.inference import prompts, scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(WithPrompts, LabelledImages):
    """Classifies a folder with one sub-folder per class."""

    example = "--images runs/aviary/unseen \\\n    --descriptions runs/aviary/unseen.json"
    kind: str = "zeroshot"
    alphas: tuple[float, ...] = option(
        (1.0, 0.5),
        "Shares of the global score, such as 0.5,1; default: 1, with descriptions 1,0.5.",
        "A",
        name="alpha",
        parse=flags.numbers,
    )
    names: bool = option(True, "Whether class names are used; else a class is its descriptions alone.")
    class_score: str = option(
        "model",
        "Region score of a class: model (model.decoder.class_score), mean over queries, or best query.",
        "HOW",
        choices=("model", "mean", "best"),
    )
    unit_features: bool = option(False, "Whether class features have unit length, as in CLIP.")

    @property
    def needs(self) -> Sequence[str]:
        return ("regions",) if self.descriptions and any(alpha < 1 for alpha in self.alphas) else ()

    def checked_alphas(self) -> list[float]:
        """The alphas to evaluate; without descriptions 1 alone. Raises errors.UserError."""
        alphas = [float(alpha) for alpha in self.alphas or (1, 0.5)]
        for alpha in alphas:
            if not 0 <= alpha <= 1:
                raise errors.UserError(f"alpha: got {alpha}, expected a number from 0 to 1")
        if self.described_by is not None:
            return alphas
        needing = "" if self.names else "a test without class names"
        if self.descriptions is None and self.alphas != ZeroShot.alphas and min(alphas) < 1:
            needing = f"alpha {min(alphas):g}"  # the user asked for it
        if needing:
            raise errors.UserError(f"descriptions: got nothing, expected a file (D.json) for {needing}")
        return [1.0]

    def check(self, model: Any = None) -> int:
        if self.note and not self.names:
            raise errors.MissingData(self.note.rpartition(";")[0])
        test_set = self.open()
        templates = lambda: self.names and prompts.load_templates(self.templates)
        config.raise_faults(faults_of(lambda: self.described(test_set), self.checked_alphas, templates))
        return len(test_set)

    def described(self, test_set: test_sets.TestSet) -> list[list[str]] | None:
        """The descriptions of each class; None without a file of descriptions."""
        if self.described_by is None:
            return None
        return read_descriptions(self.described_by, test_set.classes, test_set.stems, self.names)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Classifies every image by alpha * global score + (1 - alpha) * region score.

        Returns: counts, `chance`, `chance_top5`, and for each alpha, under `alpha_A`, the rates of
          `rates.of_classes`. With names and descriptions the global score uses both together. `by_name` has
          the same keys with names alone in the global score, at alpha 1 and at each other alpha.
        """
        test_set = self.open()
        scorer = self.scorer(predictor, test_set)

        def answers(batch: encode.Batch) -> dict[str, np.ndarray]:
            part = {"target": batch.labels}
            arrays = encode.embed(predictor, batch, regions=scorer.with_regions)
            regions = arrays["embed"], arrays["prior"]
            for way, cosines in scorer.of_images(arrays["image_embed"], *regions).items():
                part |= {f"{way} top{k}": rates.topk_hits(cosines, batch.labels, k) for k in (1, 5)}
            return part

        read: dict[str, Any] = dict(label="zero-shot", batch_size=self.batch_size)
        arrays, unreadable = encode.over_images(test_set, encode.resizing(predictor), answers, **read)
        classes, target = list(test_set.classes), arrays["target"]
        result = {
            **rates.counts_of_classes(target, classes),
            **encode.report_unreadable(unreadable),
            "names": self.names,
            "descriptions": scorer.descriptions,
            "class_score": scorer.class_score,
            "unit_features": self.unit_features,
        }
        for way in scorer.features:
            group, _, alpha = way.rpartition("/")
            part = result.setdefault(group, {}) if group else result
            part[alpha] = rates.of_classes(arrays[f"{way} top1"], arrays[f"{way} top5"], target, classes)
        return result

    def finish(self, predictor: Any, result: dict[str, Any]) -> str:
        """Adds the numbers of the first alpha on top."""
        alpha = self.checked_alphas()[0]
        result |= {"alpha": alpha, **result[f"alpha_{alpha}"], "descriptions_file": self.descriptions}
        return ""

    def scorer(self, predictor: Any, test_set: test_sets.TestSet) -> Scorer:
        """Embeds the classes of a test set; raises as `evaluate`."""
        described, alphas = self.described(test_set), self.checked_alphas()
        embeds: list[np.ndarray] = []  # of the descriptions of each class
        if described is not None:
            texts = [descriptions or [name] for name, descriptions in zip(test_set.classes, described)]
            embeds = encode.encode_texts(predictor, texts)

        def features(described: Sequence[Sequence[str]] | None) -> np.ndarray:
            if not self.names:
                return scores.class_features(embeds, self.unit_features)
            encode_all, names = functools.partial(encode.encode_distinct, predictor), list(test_set.classes)
            templates = prompts.load_templates(self.templates)
            return prompts.embed_classes(encode_all, names, templates, described, self.unit_features)

        ways = dict.fromkeys((f"alpha_{alpha}" for alpha in alphas), features(described))
        if described is not None and self.names:
            ways |= dict.fromkeys((f"by_name/alpha_{x}" for x in (1.0, *alphas)), features(None))
        by = predictor.class_score if self.class_score == "model" else self.class_score
        return Scorer(ways, embeds, min(alphas) < 1, sum(map(len, described or ())), by)


class Scorer(NamedTuple):
    """Scores of the classes of a test set."""

    features: dict[str, np.ndarray]  # way, "alpha_0.5" or "by_name/alpha_1.0" -> [C, D]
    description_embeds: list[np.ndarray]  # for each class [n_c, D]
    with_regions: bool  # whether it needs the regions of the images
    descriptions: int  # how many all classes have together
    class_score: str  # of `scores.region_scores`

    def of_images(
        self, image_embed: np.ndarray, region_embed: np.ndarray, prior: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Embeddings [B, D] and [B, Q, D], priors [B, Q] -> for each way the scores [B, C]."""
        regions, out = None, {}
        if self.with_regions:
            regions = scores.region_scores(region_embed, self.description_embeds, self.class_score, prior)
        for way, features in self.features.items():
            alpha = float(way.rpartition("_")[2])
            out[way] = scores.combine(scores.global_scores(image_embed, features), regions, alpha)
        return out


def read_descriptions(
    path: epath.PathLike, classes: Sequence[str], stems: Sequence[str] | None = None, names: bool = True
) -> list[list[str]]:
    """Reads the descriptions of each class from a file {"class name": ["description", ...]}.

    A class is found by its name (`_` = space), then by the letters and digits of the name, then of its stem
    (see `class_names.stems`). The stem comes first if two classes have the same name. With `names` a
    list may be empty, as in published files. Raises errors.UserError, also at a class without description.
    """
    path = epath.Path(path).expanduser()
    expected = 'descriptions of the classes, {"class name": ["description", ...]}'
    value = regular_file.read_json(path, dict[str, list[str]], expected)
    spelt = {test_sets.of_folder(name): name for name in value}
    known: dict[Any, list[str]] = {_letters(name): texts for name, texts in value.items()}
    known |= {name: value[key] for name, key in spelt.items()}
    described, often = [], collections.Counter(classes)
    for name, stem in zip(classes, stems or classes):
        keys = [name, _letters(name), _letters(stem)]
        if often[name] > 1:
            keys.reverse()
        described.append(next((known[key] for key in keys if key in known), None))
    missing = [n for n, texts in zip(classes, described) if texts is None or not (texts or names)]
    if missing:
        raise errors.UserError(f"{path}: no description of the classes {test_sets.listed(missing)}")
    return [texts for texts in described if texts is not None]


def _letters(name: str) -> tuple[str, ...]:
    """The letters and digits of a name, without case; a tuple, so that as a key it equals no name."""
    return tuple(re.findall(r"[^\W_]+", class_names.composed(name.casefold())))
