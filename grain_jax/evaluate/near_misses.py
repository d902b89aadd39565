"""Is the right description of a box nearer to it than its hard negatives?

The protocol of FG-OVD (Bianchi et al., CVPR 2024, "The Devil is in the Fine-Grained Details") for boxes that are given:
each box is compared with its description and its first N negatives; boxes with fewer are left out. The rank of the
description is 1 + the number of negatives whose score is at least its own (but for `rates.TIE`), as in
lorebianchi98/FG-OVD, evaluation/ranks.py. There detectors find the boxes, and one that was not found has the last rank.
"""

from typing import Any

import numpy as np
from etils import epath

from grain_jax.evaluate import annotated as annotated_lib
from grain_jax.evaluate import encode, given_boxes, rates
from grain_jax.evaluate.test_sets import InputError
from grain_jax.inference import scores

NEGATIVES = 10  # as in FG-OVD


def evaluate(
    predictor: encode.Predictor,
    *,
    images: epath.PathLike,
    annotations: epath.PathLike,
    negatives: int = NEGATIVES,
    orientation: str = "exif",
    batch_size: int = encode.BATCH_SIZE,
) -> dict[str, Any]:
    """Compares every annotated box with its description and its negatives.

    Args:
      predictor: the model.
      images: the folder that the annotations' paths start from.
      annotations: `A.jsonl` whose regions have `negatives`.
      negatives: N, how many of each box are used.
      orientation: of the images, as of `files.images`.
      batch_size: images at a time.

    Returns: counts; `chance` (of top-1), `chance_mean_rank`; under `box_head` (by the embedding of the box), `region` (by
      that of the query that overlaps the box most) and `image` (by the image embedding), as the model has them: `top1`,
      the share of boxes whose description is the nearest of the N + 1 texts, with a 95% interval (`_low`, `_high`; ties
      count as if broken at random), `mean_rank` and `median_rank` (1 is best; ties count as lost).

    Raises:
      test_sets.InputError, annotations.AnnotationError: the images or the annotations cannot be used, or no box has so
        many negatives.
    """
    annotated = annotated_lib.read(
        images,
        annotations,
        lambda record: any(len(region.negatives) >= negatives for region in record.regions),
        f"no region has {negatives} negatives or more; expected regions with `negatives`, which grain-jax annotate --passes"
        " negatives makes; or ask for fewer",
        orientation,
    )
    unreadable: dict[str, str] = {}
    seen = given_boxes.encode_boxes(
        predictor, annotated, label="near misses", unreadable=unreadable, batch_size=batch_size
    )
    pairs = zip(seen.described.image, seen.described.region)
    regions = [seen.records[image].regions[region] for image, region in pairs]
    use = np.array([len(region.negatives) >= negatives for region in regions], bool)
    if not use.any():
        raise InputError(
            f"{annotations}: no box with {negatives} negatives or more lies in its image"
        )
    lists = [
        [region.description, *region.negatives[:negatives]]
        for region in regions
        if len(region.negatives) >= negatives
    ]
    place = {text: i for i, text in enumerate(dict.fromkeys(sum(lists, [])))}
    embed = scores.unit(encode.encode_distinct(predictor, list(place)))  # [T, D]
    texts = np.array([[place[text] for text in each] for each in lists])  # [M, 1 + N]
    right = np.arange(1 + negatives) == np.zeros((len(lists), 1), int)

    def measured(box_embed: np.ndarray) -> dict[str, float]:
        cosines = np.stack(
            [embed[own] @ box for own, box in zip(texts, scores.unit(box_embed))]
        )  # [M, 1 + N]
        rank = 1 + (cosines[:, 1:] >= cosines[:, :1] - rates.TIE).sum(axis=1)
        return {
            **rates.rate("top1", rates.topk_hits(cosines, right, 1)),
            "mean_rank": float(rank.mean()),
            "median_rank": float(np.median(rank)),
        }

    return {
        "kind": "near_misses",
        "pictures": seen.pictures,
        "faulty_lines": annotated.read.faulty_lines,
        **encode.report_unreadable(unreadable),
        "boxes": len(lists),
        "boxes_outside": seen.described.outside,
        "boxes_with_fewer_negatives": int((~use).sum()),
        "negatives": negatives,
        "chance": 1 / (1 + negatives),
        "chance_mean_rank": 1 + negatives / 2,
        **{key: measured(box_embed[use]) for key, box_embed in seen.embeds.items()},
    }
