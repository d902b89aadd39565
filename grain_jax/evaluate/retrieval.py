"""Retrieval between images and captions, both ways: R@1, R@5, R@10 (Flickr30k, MS-COCO, or any A.jsonl).

Every caption of an image counts. Images whose captions are equal are all right answers to that text;
the texts to choose from are the distinct ones.
"""

from typing import Any

import numpy as np
from etils import epath

from grain_jax.evaluate import base
from grain_jax.inference import scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.runtime import processes

KS = (1, 5, 10)
_ROWS_AT_ONCE = 1024  # bounds the similarities in memory


def evaluate(
    predictor: Any,
    *,
    images: epath.PathLike,
    annotations: epath.PathLike,
    batch_size: int = base.BATCH_SIZE,
) -> dict[str, Any]:
    """Ranks all distinct captions for each image, and all images for each caption.

    An image without a web caption stands in with its synthetic one, and without either is left out;
    both are counted. Two captions are equal if the tokenizer's cleaning and lower-casing makes them so.

    Args:
      predictor: the model (see `base`).
      images: the folder that the annotations' paths start from.
      annotations: `A.jsonl`.
      batch_size: images at a time.

    Returns: counts; `image_to_text` and `text_to_image`, each with `r1`, `r5`, `r10` (a right answer among
      the first k; 95% intervals `_low`, `_high`) and `chance_r1`... (of a random order). Ties count as if
      broken at random.

    Raises:
      base.InputError, annotations.AnnotationError: what was given cannot be used.
    """
    every, records, folder = read(images, annotations)
    unreadable: dict[str, str] = {}
    batches = base.encode_pictures(
        predictor,
        [folder / r.image for r in records],
        label="retrieval",
        unreadable=unreadable,
        regions=False,
        batch_size=batch_size,
    )
    found = processes.allgather(
        dict(index=batch.index, embed=batch.image_embed) for batch in batches
    )
    kept = [records[i] for i in found["index"]]
    image_embed = scores.unit(found["embed"])  # [N, D]
    owner, text_of, texts = _pairs(kept)
    text_embed = scores.unit(base.encode_distinct(predictor, texts))  # [M, D]

    right = np.zeros((len(kept), len(texts)), bool)
    right[owner, text_of] = True
    return {
        "kind": "retrieval",
        "pictures": len(kept),
        "captions": len(owner),
        "distinct_captions": len(texts),
        "synthetic_captions": sum(not r.captions for r in kept),
        "without_caption": len(every.records) - len(records),
        "faulty_lines": every.faulty_lines,
        **base.report_unreadable(unreadable),
        "image_to_text": _recalls(image_embed, text_embed, right),
        "text_to_image": _recalls(text_embed, image_embed, right.T, rows=text_of),
    }


def read(images: epath.PathLike, annotations: epath.PathLike) -> base.Annotated:
    """The annotations with a caption; errors as in `evaluate`."""
    return base.read_annotations(
        images,
        annotations,
        lambda record: record.captions or record.synthetic_caption,
        "no line has a caption; expected captions to retrieve",
    )


def _pairs(records) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Every caption's image and text, as positions, and the distinct texts."""
    place: dict[str, int] = {}
    owner, text_of, texts = [], [], []
    for i, record in enumerate(records):
        for caption in record.captions or (record.synthetic_caption,):
            key = tokenizer.clean(caption).lower()
            if key not in place:
                place[key] = len(texts)
                texts.append(caption)
            owner.append(i)
            text_of.append(place[key])
    return np.array(owner), np.array(text_of), texts


def _recalls(queries, candidates, right, rows=None) -> dict[str, float]:
    """R@k of ranking `candidates` [C, D] for `queries` [N, D] (those at `rows`: a query may count often)."""
    parts = {k: [] for k in KS}
    for first in range(0, len(queries), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        similarity = queries[part] @ candidates.T
        for k in KS:
            parts[k].append(base.topk_hits(similarity, right[part], k))
    out = {}
    for k in KS:
        hits = np.concatenate(parts[k])
        chance = base.chance_of_topk(right, k)
        if rows is not None:
            hits, chance = hits[rows], chance[rows]
        out |= {**base.rate(f"r{k}", hits), f"chance_r{k}": float(chance.mean())}
    return out
