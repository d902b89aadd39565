"""Evaluators that try every score of a model, so that validation images can choose among them.

c.evals.quiet = kinds.evaluator("examples.claim.scores:Scores", "FOLDER", descriptions="D.json", names=False)
c.evals.test = kinds.evaluator("examples.claim.scores:Regions", "DIR", annotations="A.jsonl", instances="I")
"""

import dataclasses
import hashlib
import itertools
from typing import Any

import numpy as np

from grain_jax import inference
from grain_jax.evaluate import detection, encode, evaluators, grounding, rates, zeroshot
from grain_jax.evaluate.base import option
from grain_jax.inference import scores

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # of log P(object): model.boxes.object_weight
OF_REGIONS = ("phrase_acc50", "phrase_iou", "phrase_acc50_other_image", "box_iou", "region_to_description_r1")


def grid_boxes(cells: int, *sides: int) -> np.ndarray:
    """All boxes that are one of `sides` of `cells` wide and high, xyxy [n, 4] in [0, 1]."""
    every = [(x, y, s) for s in sides for y in range(cells - s + 1) for x in range(cells - s + 1)]
    return np.array([(x, y, x + s, y + s) for x, y, s in every]) / cells


class Weighted:
    """A predictor whose proposals have another object weight; `seen` are results for batches, by digest."""

    def __init__(self, predictor, weight: float, seen: dict[bytes, Any]):
        self._predictor, self._factor = predictor, weight / predictor.model.boxes.object_weight
        self._seen = seen

    def __getattr__(self, name: str):
        return getattr(self._predictor, name)

    def encode_image_and_regions(self, images):
        """As the predictor's."""
        batch = hashlib.sha256(np.stack(images).tobytes()).digest()
        if batch not in self._seen:
            self._seen[batch] = self._predictor.encode_image_and_regions(images)
        image_embed, regions = self._seen[batch]
        return image_embed, regions._replace(prior=regions.prior * np.float32(self._factor))

    def encode_regions(self, images):
        """As the predictor's."""
        return self.encode_image_and_regions(images)[1]


def ways(predictor) -> dict[str, Weighted | inference.Predictor]:
    """The model with each of its sorts of regions: `queries`, and proposals by weight, `w_0.05`."""
    model, sorts = predictor.model, {}
    if model.decoder is not None:
        queries = dataclasses.replace(model, boxes=dataclasses.replace(model.boxes, proposals=False))
        sorts["queries"] = inference.Predictor(queries, predictor.params)
    if predictor.has_proposals:
        seen: dict[bytes, Any] = {}
        sorts |= {f"w_{weight}": Weighted(predictor, weight, seen) for weight in WEIGHTS}
    return sorts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores(zeroshot.ZeroShot):
    """Top-1 of class folders. It has ZeroShot's options; a class is its descriptions alone."""

    shown = ("image/alpha_1.0/top1",)
    kind: str = "scores"
    names: bool = False
    needs = ()  # a model without regions has the score of the image, and of fixed boxes

    def evaluate(self, predictor):
        """Per score and share of the global score `SCORE/alpha_A/top1`.

        Regions score by `mean` and `best` of the queries, and by the best proposal, `w_0.05` for each weight.
        A box head adds the best of fixed boxes: windows of 2 x 2 and 3 x 3 patches; 1 + 4 + 9 parts of the
        image.
        """
        test_set, of_regions = self.open(), ways(predictor)
        texts = encode.encode_texts(predictor, self.described(test_set))
        features, fixed = scores.class_features(texts), {}
        if predictor.has_box_head:
            fixed["windows"] = grid_boxes(predictor.grid, 2, 3)
            fixed["parts"] = np.concatenate([grid_boxes(cells, 1) for cells in (1, 2, 3)])

        def answers(batch):
            seen = encode.embed(predictor, batch)
            by = {"image": scores.global_scores(seen["image_embed"], features)}
            for name, way in of_regions.items():
                _, embed, prior = way.encode_regions(batch.pixels)
                for how in ("mean", "best") if name == "queries" else (name,):
                    of_how = "mean" if how == "mean" else "best"
                    by[how] = scores.region_scores(embed, texts, of_how, prior)
            for name, boxes in fixed.items():
                embeds = predictor.encode_boxes(batch.pixels, [boxes] * len(batch.index))
                by[name] = scores.region_scores(np.stack(embeds), texts, "best")
            hits = {"target": batch.labels}
            for (name, region), alpha in itertools.product(by.items(), ALPHAS):
                score = scores.combine(by["image"], region, alpha)
                hits[f"{name}/alpha_{alpha}"] = rates.topk_hits(score, batch.labels, 1)
            return hits

        read = dict(label=self.kind, batch_size=self.batch_size)
        arrays, unreadable = encode.over_images(test_set, encode.resizing(predictor), answers, **read)
        counts = rates.counts_of_classes(arrays.pop("target"), list(test_set.classes))
        result = {"kind": self.kind, **counts, **encode.report_unreadable(unreadable)}
        for name, hits in arrays.items():
            score, _, alpha = name.partition("/")
            result.setdefault(score, {})[alpha] = rates.rate("top1", hits)
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions(evaluators.AnnotatedImages):
    """Phrases, their boxes and detection by each sort of regions (`ways`); nothing for a model without."""

    kind: str = "regions"
    instances: str | None = option(None, "JSON in COCO's form.", "FILE")

    def evaluate(self, predictor):
        """Per sort of regions: OF_REGIONS of `grounding`, and `ap50` of `detection`."""
        result = {}
        ground = grounding.Grounding(images=self.images, annotations=self.annotations)
        detect = detection.Detection(images=self.images, annotations=self.instances)
        for name, way in ways(predictor).items():
            grounded = ground.evaluate(way)
            result[name] = {key: grounded[key] for key in OF_REGIONS} | {"ap50": detect.evaluate(way)["ap50"]}
        return result
