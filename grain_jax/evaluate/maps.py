"""Evaluation of similarity maps: does the map of a phrase lie where its boxes are?

There are two measures for any kind of map (`Predictor.similarity_maps`):

- The pointing game (Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop"): the highest cell of the map
  lies in a box of the phrase, without a margin around the box.
- The IoU of the boxes and the part of the image where the map, scaled to [0, 1] and resized, is above a threshold. All
  phrases share the threshold that is best for their mean.

As in `grounding`, every entry of `phrases` in A.jsonl is one phrase with its boxes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import STANDALONE, Context, TableRow
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.evaluate import encode, grounding, rates
    from grain_jax.inference import prompts, scores

_SIDE = 64  # pixels that maps are resized to, for the IoU


_PHRASES = "phrases", "phrases"  # count and unit of table rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps(AnnotatedImages):
    """Where similarity maps of phrases are high, against their boxes."""

    table = (
        TableRow("pointing", "highest place of a map in a box", "chance_pointing", *_PHRASES),
        TableRow("map_iou", "IoU of a map and the boxes", "chance_map_iou", *_PHRASES, False),
    )
    kind: str = "maps"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Compares the similarity map of each phrase with its boxes.

        Returns: counts; `pointing`, the share of phrases whose highest cell has its centre in one of their boxes, with a
          95% interval (`_low`, `_high`). `chance_pointing` is the same for any cell. `map_iou` is the mean IoU with the
          boxes at the best threshold, `map_iou_threshold`. `chance_map_iou` is the IoU of the whole image.
        """
        annotated = self.read()
        regions = [region for record in annotated.records for region in record.regions]
        texts, _ = prompts.distinct([region.description for region in regions])
        text_embed = scores.unit(encode.encode_distinct(predictor, texts))  # [T, D]
        position = {text: i for i, text in enumerate(texts)}

        def measures(batch: encode.Batch) -> dict[str, np.ndarray]:
            records = [annotated.records[i] for i in batch.index]
            described = grounding.described_boxes(records, batch.sizes)
            phrases: list[list[tuple[int, np.ndarray]]] = [[] for _ in records]  # text and boxes
            for boxes in described.phrases:
                text = position[described.texts[described.text[boxes[0]]]]
                phrases[described.image[boxes[0]]].append((text, described.boxes_xyxy[boxes]))
            embeds = [text_embed[[text for text, _ in each]] for each in phrases]
            maps = predictor.similarity_maps(batch.pixels, embeds)
            pairs = [
                (map_, boxes)
                for of_image, each in zip(maps, phrases)
                for map_, (_, boxes) in zip(of_image, each)
            ]
            counts = dict(index=batch.index, outside=np.array([described.outside]))
            return counts | _measured(pairs)

        arrays, unreadable = encode.over_images(
            annotated.paths,
            encode.resizing(predictor),
            measures,
            label="maps",
            batch_size=context.batch_size,
        )
        if not len(arrays["hit"]):
            raise errors.UserError(f"{self.annotations}: every box lies outside its image")
        iou = arrays["iou"].mean(axis=0)
        best = int(iou.argmax())
        return {
            **self.counts(annotated, len(arrays["index"]), unreadable),
            "regions_outside": int(arrays["outside"].sum()),
            "phrases": len(arrays["hit"]),
            **rates.rate("pointing", arrays["hit"]),
            "chance_pointing": float(arrays["chance"].mean()),
            "map_iou": float(iou[best]),
            "map_iou_threshold": float(thresholds()[best]),
            "chance_map_iou": float(arrays["area"].mean()),
        }


def thresholds() -> np.ndarray:
    """The thresholds of a map in [0, 1] that are tried."""
    return np.arange(0.05, 1, 0.05)


def _measured(phrases: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The measures of phrases, each a map [h, w] and boxes xyxy [n, 4]: hit, chance, area [P] and iou [P, thresholds]."""
    levels = thresholds()
    out: dict[str, np.ndarray] = {key: np.zeros(len(phrases)) for key in ("hit", "chance", "area")}
    out |= {"iou": np.zeros((len(phrases), len(levels)))}
    for i, (map_, boxes_xyxy) in enumerate(phrases):
        right = _covered(boxes_xyxy, *map_.shape)
        out["hit"][i] = right[map_ >= map_.max() - rates.TIE].mean()
        out["chance"][i] = right.mean()
        inside = _covered(boxes_xyxy, _SIDE, _SIDE)
        out["area"][i] = inside.mean()
        large = scores.resize_map(map_[None], _SIDE, _SIDE)[0]
        large = (large - large.min()) / max(np.ptp(large), rates.TIE)
        marked = large >= levels[:, None, None]
        both = (marked & inside).sum((1, 2))
        out["iou"][i] = both / np.maximum((marked | inside).sum((1, 2)), 1)
    return out


def _covered(boxes_xyxy: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which cells have their centre in one of the boxes, bool [rows, columns]."""
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    x1, y1, x2, y2 = boxes_xyxy.T[:, :, None]
    down, across = (y1 <= y) & (y <= y2), (x1 <= x) & (x <= x2)  # [n, rows], [n, columns]
    return (down[:, :, None] & across[:, None]).any(0)
