"""Diagnostics of the region queries: where each predicts boxes, what it is matched to, whether that still changes.

DETR-like decoders learn slowly while the matching of queries to regions flips between evaluations
(DN-DETR, Li et al. 2022, section 3.1); `matching_stability` is the share of regions that keep their query. Boxes,
texts and the matching come from `grounding`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from typing import Any

from etils import epy

from grain_jax.evaluate.base import STANDALONE, Context, TableRow
from grain_jax.evaluate.evaluators import AnnotatedRegions

with epy.lazy_imports():
    import numpy as np
    from etils import epath

    from grain_jax.core import atomic
    from grain_jax.evaluate import encode, grounding, rates
    from grain_jax.inference import scores
    from grain_jax.losses import boxes
    from grain_jax.runtime import processes

KEPT = 16  # evaluations whose matching the file keeps, for a run that resumes from an earlier step
TOP = 5  # most frequent descriptions that are listed per query

_OF = "regions_matched", "boxes"  # of the rows of the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostics(AnnotatedRegions):
    """What each region query predicts, and what it is matched to (docs/diagnostics.md)."""

    table = (
        TableRow("matched_iou", "matched box IoU", None, *_OF, False),
        TableRow("matched_iou50", "matched box Acc@0.5", None, *_OF),
        TableRow("matching_stability", "same query as before", "chance_matching_stability", *_OF),
        TableRow("query_usage_entropy", "use of the queries, 1: even", None, *_OF, False),
    )
    kind: str = "diagnostics"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Matches queries to the described boxes of a fixed set of images, and summarises the matches of each query.

        With `context.state_path`, the first process keeps there the matching of the last KEPT evaluations of the run,
        and the newest result. Evaluations of `context.step` and later ones, which a resumed run repeats, are dropped.

        Returns: counts, and (95% intervals of shares: `_low`, `_high`)
          `matched_iou`, `matched_iou50`: mean IoU of matched boxes, and the share with IoU >= 0.5;
          `region_to_description_r1`, `_r5`: share of matched regions whose text is among the 1 or 5 nearest of all
            distinct descriptions; `chance_region_to_description_r1`, `_r5`;
          `query_usage_entropy`: entropy of the shares of matched regions per query, divided by ln Q; 1: equal shares;
          `description_entropy`: entropy of the descriptions of the matched regions, in nats;
          `matching_stability`: share of regions matched to the same query as at step `stability_since_step`, the
            previous evaluation of the same regions; left out without one. `chance_matching_stability`: the share if
            both evaluations assigned their queries in a random order;
          `query`: number of the query -> `share` of the matched regions, and for a share above 0 the mean box `cx`,
            `cy`, `w`, `h` in [0, 1] with standard deviations `cx_spread` ..., `description_entropy` and `descriptions`,
            the most frequent ones with their counts.
        """
        records, seen, counts = self.gather(predictor, context, regions=True)
        described = grounding.some_described_boxes(self.annotations, records, seen.sizes)
        pred_boxes_xyxy, region_embed = seen.regions
        text_embed = scores.unit(encode.encode_distinct(predictor, described.texts))  # [T, D]

        matched, text = grounding.match(pred_boxes_xyxy, described)
        pairs = matched.image, matched.query
        embed = scores.unit(region_embed[pairs])
        queries = pred_boxes_xyxy.shape[1]
        uses = np.bincount(matched.query, minlength=queries)
        result = {
            **counts,
            "regions": len(described.image),
            "regions_matched": len(matched.query),
            "distinct_descriptions": len(described.texts),
            "matched_iou": float(matched.iou.mean()),
            **rates.rate("matched_iou50", matched.iou >= boxes.FOUND_IOU),
            "query_usage_entropy": _entropy(uses) / math.log(queries) if queries > 1 else 1.0,
            "description_entropy": _entropy(np.bincount(text)),
        }
        for k, right in zip((1, 5), rates.nearest_hits(embed, text_embed, text)):
            result |= rates.rate(f"region_to_description_r{k}", right)
            result[f"chance_region_to_description_r{k}"] = min(1.0, k / len(described.texts))
        pred_boxes_cxcywh = np.asarray(boxes.xyxy_to_cxcywh(pred_boxes_xyxy[pairs]))
        path, step = context.state_path and epath.Path(context.state_path), context.step or 0
        # All that decides which regions are matched, and in which order.
        lists = [x.tolist() if isinstance(x, np.ndarray) else x for x in described[:-1]]
        content = json.dumps([[record.image for record in records], lists, queries])
        regions = hashlib.sha256(content.encode()).hexdigest()
        before = _evaluations(path, regions, step) if path else []
        if before:
            then = np.array(before[-1]["query"])
            shares = [np.bincount(x, minlength=queries) / len(x) for x in (matched.query, then)]
            result |= rates.rate("matching_stability", matched.query == then)
            result["chance_matching_stability"] = float(shares[0] @ shares[1])
            result["stability_since_step"] = before[-1]["step"]
        result["query"] = {
            str(q): _of_query(matched.query == q, pred_boxes_cxcywh, text, described.texts)
            for q in range(queries)
        }
        if path and processes.process_info()[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            evaluations = [*before, {"step": step, "query": matched.query.tolist()}][-KEPT:]
            state = {"result": result, "regions": regions, "evaluations": evaluations}
            atomic.write_text(path, json.dumps(state, ensure_ascii=False) + "\n")
        return result


def _of_query(mine, boxes_cxcywh, text, texts) -> dict[str, Any]:
    """Summary of one query; `mine` bool [n] says which of all matched regions are its own."""
    out: dict[str, Any] = {"share": float(mine.mean())}
    if not mine.any():
        return out
    for name, values in zip(("cx", "cy", "w", "h"), boxes_cxcywh[mine].T):
        out |= {name: float(values.mean()), f"{name}_spread": float(values.std())}
    counts = np.bincount(text[mine])
    often = np.argsort(-counts, kind="stable")[:TOP]
    out["description_entropy"] = _entropy(counts)
    out["descriptions"] = [[texts[i], int(counts[i])] for i in often if counts[i]]
    return out


def _entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution that counts give, in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _evaluations(path: epath.Path, regions: str, step: int) -> list[dict[str, Any]]:
    """The evaluations before `step` of the same regions."""
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        if stored["regions"] != regions:
            return []
        return [each for each in stored["evaluations"] if each["step"] < step]
    except (ValueError, KeyError, TypeError):  # a diagnostic must not end a run
        print(f"{path}: damaged; matching stability starts anew", file=sys.stderr)
        return []
