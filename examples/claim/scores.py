"""An evaluator: top-1 of class folders by every score of a model, to choose among them on validation images.

c.evals.quiet = kinds.evaluator("examples.claim.scores:Scores", "FOLDER", descriptions="D.json", names=False)
"""

import dataclasses
import itertools

import numpy as np

from grain_jax.evaluate import encode, rates, zeroshot
from grain_jax.inference import scores

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEMPERATURES = (0.02, 0.05, 0.1)  # of log-sum-exp over queries, in cosines


def grid_boxes(cells: int, *sides: int) -> np.ndarray:
    """All boxes that are one of `sides` of `cells` wide and high, xyxy [n, 4] in [0, 1]."""
    every = [(x, y, s) for s in sides for y in range(cells - s + 1) for x in range(cells - s + 1)]
    return np.array([(x, y, x + s, y + s) for x, y, s in every]) / cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores(zeroshot.ZeroShot):
    """It has ZeroShot's options. A class is its descriptions alone."""

    shown = ("image/alpha_1.0/top1",)
    kind: str = "scores"
    names: bool = False
    needs = ()  # a model without regions has the score of the image, and of fixed boxes

    def evaluate(self, predictor):
        """Per score and share of the global score `SCORE/alpha_A/top1`.

        Regions score by `mean` and `best` of scores.region_scores, and by log-sum-exp over queries. A box
        head adds the best of fixed boxes: windows of 2 x 2 and 3 x 3 patches; 1 + 4 + 9 parts of the image.
        """
        test_set = self.open()
        texts = encode.encode_texts(predictor, self.described(test_set))
        features, fixed = scores.class_features(texts), {}
        if predictor.has_box_head:
            fixed["windows"] = grid_boxes(predictor.grid, 2, 3)
            fixed["parts"] = np.concatenate([grid_boxes(cells, 1) for cells in (1, 2, 3)])

        def answers(batch):
            seen = encode.embed(predictor, batch, regions=predictor.has_regions)
            by = {"image": scores.global_scores(seen["image_embed"], features)}
            if predictor.has_regions:
                by |= {how: scores.region_scores(seen["embed"], texts, how) for how in ("mean", "best")}
                by |= {f"logsumexp_{t}": soft_best(seen["embed"], texts, t) for t in TEMPERATURES}
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


def soft_best(region_embed, description_embeds, temperature: float) -> np.ndarray:
    """As scores.region_scores by "best", with a log-mean-exp over queries in place of the maximum."""
    counts = [len(embeds) for embeds in description_embeds]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    similarity = region_embed @ np.concatenate(description_embeds).T / temperature  # [B, Q, n]
    most = similarity.max(axis=1)
    soft = most + np.log(np.exp(similarity - most[:, None]).mean(axis=1))
    return temperature * np.add.reduceat(soft, starts, axis=-1) / counts
