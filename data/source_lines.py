"""The images of a data source as lines of A.jsonl."""

from typing import Any

from grain_jax.core.annotations import Annotation, Region


def region(described: Region) -> dict[str, Any]:
    """The object of a region in a line."""
    out = {
        "box": described.box_xyxy,
        "description": described.description,
        "score": described.score,
    }
    return out | ({"negatives": described.negatives} if described.negatives else {})


def line(item: Annotation) -> dict[str, Any]:
    """The object of an image's line."""
    out: dict[str, Any] = {"image": item.image}
    if len(item.captions) == 1:
        out["caption"] = item.captions[0]
    elif item.captions:
        out["captions"] = list(item.captions)
    if item.synthetic_caption:
        out["synthetic_caption"] = item.synthetic_caption
    out["regions"] = list(map(region, item.regions))
    if item.phrases is not None:
        out["phrases"] = list(map(list, item.phrases))
    if item.id is not None:
        out["id"] = item.id
    return out
