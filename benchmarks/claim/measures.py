"""What the report says of a run: the names of arms and columns, the headline, whether it trained, spreads."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.claim import design, schedule
from benchmarks.claim.results import Result

LABELS = {
    "clip": "CLIP, web captions",
    "clip_descriptions": "CLIP, descriptions in its captions",
    "clip_captions": "CLIP, two captions",
    "clip_image_description": "CLIP, L_id",
    "clip_both": "CLIP, L_id, two captions",
    "clip_pooled": "CLIP, L_id, two captions, pooled",
    "grain": "GRAIN",
    "grain_image_description": "GRAIN, L_id",
    "grain_captions": "GRAIN, two captions",
    "grain_both": "GRAIN, L_id, two captions",
    "grain_pooled": "GRAIN, L_id, two captions, pooled",
    "grain_boxes": "GRAIN, L_id, two captions, pooled, L_bd",
}


def headline(result: Result) -> float:
    """Top-1 of the unseen test classes by description, alpha 1 (`schedule.by_description`)."""
    return schedule.by_description(result, "test")


def health(result: Result) -> float:
    """Final L_ic over its value for embeddings that know nothing: ln B for one caption an image."""
    batch = result["batch_size"]
    captions = design.ARMS[result["arm"]].get("input.captions_per_image", 1)
    return result["loss_image_caption"] / math.log(batch * (1 + captions * (batch - 1))) * 2


def faults(result: Result) -> list[str]:
    """Signs that a run did not train; empty for a healthy one."""
    found = []
    if health(result) >= 0.9:
        found.append(f"L_ic is {health(result):.2f} of its chance value")
    seen, chance = (result[f"seen_test/{key}"] for key in ("alpha_1.0/top1", "chance"))
    half_way = (1 + chance) / 2  # of few classes, 10 times chance is more than all
    least, said = min((10 * chance, "10 times chance"), (half_way, "half way from chance to all"))
    if seen < least:
        found.append(f"seen names are at {100 * seen:.1f}%, less than {said}")
    return found


COLUMNS = {  # heading -> column of the results, scale, digits
    "seen by name": ("seen_test/alpha_1.0/top1", 100, 1),
    "unseen, mean": ("unseen_test/alpha_1.0/top1", 100, 1),
    "of unit length": ("unit_test/alpha_1.0/top1", 100, 1),
    "one sentence": ("sentence_test/alpha_1.0/top1", 100, 1),
    ".75": ("unseen_test/alpha_0.75/top1", 100, 1),
    ".5": ("unseen_test/alpha_0.5/top1", 100, 1),
    ".25": ("unseen_test/alpha_0.25/top1", 100, 1),
    "0": ("unseen_test/alpha_0.0/top1", 100, 1),
    "retrieval R@1, to text": ("retrieval/image_to_text/r1", 100, 1),
    "to image": ("retrieval/text_to_image/r1", 100, 1),
}
GROUNDING = {
    "IoU, unseen": ("grounding_unseen/box_iou", 1, 3),
    "Acc@0.5": ("grounding_unseen/box_acc50", 100, 1),
    "region to description R@1, seen": ("grounding_seen/region_to_description_r1", 100, 1),
    "unseen": ("grounding_unseen/region_to_description_r1", 100, 1),
    "phrase to box Acc@0.5, unseen": ("grounding_unseen/phrase_acc50", 100, 1),
}


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation of values times `scale`."""
    values = [scale * value for value in values]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def cell(results: Sequence[Result], key: str, scale: float = 100, digits: int = 1) -> str:
    """The `spread` of that column, of the rows that have it."""
    values = [r[key] for r in results if key in r]
    return spread(values, scale, digits) if values else "-"
