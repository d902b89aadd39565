"""Runs a trained model on images of the evaluations in its config, for the sections of the report.

The results (classes, confusions, regions, queries, attention, texts) are saved as `report_data.json` in the workdir, so
that a second report needs neither the model nor the images.
"""

import collections
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import atomic, errors, regular_file
from grain_jax.evaluate import encode, rates, segmentation, test_sets, zeroshot
from grain_jax.report import masks, regions, written
from grain_jax.report.arguments import NUM_IMAGES
from grain_jax.report.thumbnails import Thumbnails
from grain_jax.runtime import checkpoint, processes

FILE = "report_data.json"
_VERSION = 1  # of the format of report_data.json
_PAIRS = 12  # confused pairs of classes shown for each evaluation and alpha
_EXAMPLES = 3  # images shown of each pair
_SMALL = 96  # longer side of a thumbnail, pixels


@processes.alone()
def collect(
    workdir: epath.PathLike,
    config: Mapping[str, Any],
    predictor: Any = None,
    *,
    step: int | None = None,
    num_images: int = NUM_IMAGES,
) -> dict[str, Any]:
    """Runs the model on the evaluations of the run; an earlier result for the same step is read from its file.

    Args:
      workdir: workdir of the run; its newest checkpoint is loaded if `predictor` is None.
      config: the content of `config.json`.
      predictor: the model (`inference.Predictor`), if it is in memory already.
      step: the training step of `predictor`.
      num_images: images used of each evaluation, evenly spaced in its order.

    Returns: a dict that can be written as JSON; `lines` maps each missing part to the reason.
    """
    workdir = epath.Path(workdir)
    if predictor is None:
        steps = checkpoint.finished_steps(workdir)
        step = steps[-1] if steps else None
    evals = config.get("evals", {})
    asked = {"version": _VERSION, "step": step, "pictures": num_images, "evals": evals}
    asked = json.loads(json.dumps(asked))  # as read back from the file: lists for tuples
    kept = _kept(workdir / FILE)
    if predictor is None and kept and kept["asked"] == asked:
        return kept
    made: dict[str, Any] = {"asked": asked, "zeroshot": {}, "segmentation": {}}
    made |= {"lines": {}, "whole": True}
    thumbs = Thumbnails()

    @contextlib.contextmanager
    def line(part: str):
        try:
            yield
        except (errors.UserError, OSError) as error:
            made["lines"][part] = str(error).split("\n")[0]
            made["whole"] &= isinstance(error, regions.NoRegions)

    with line("model"):
        if predictor is None:
            predictor = inference.load(workdir)
            # `load` falls back to an older checkpoint if the newest one is damaged.
            made["asked"]["step"] = int(epath.Path(predictor.folder).name)
    if predictor is None:
        return made | {"thumbs": []}
    for name, entry in evals.items():
        with line(name):
            parsed = config_lib.evaluator_from_dict(entry)
            if isinstance(parsed, zeroshot.ZeroShot):
                made["zeroshot"][name] = _zeroshot(predictor, parsed, thumbs, num_images)
            if isinstance(parsed, segmentation.Segmentation):
                made["segmentation"][name] = masks.collect(predictor, parsed.available()[0])
    with line("regions"):
        made |= regions.collect(predictor, evals, thumbs, num_images)
    if getattr(predictor, "has_text_decoder", False):
        with line("written"):
            made["written"] = written.collect(predictor, evals)
    made["thumbs"] = thumbs.uris
    atomic.write_text(workdir / FILE, json.dumps(made, ensure_ascii=False) + "\n")
    return made


def _kept(path: epath.Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(regular_file.read_text(path, "a report's data", 4 << 30))
        return kept if kept["whole"] and kept["asked"]["version"] == _VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _zeroshot(
    predictor, entry: zeroshot.ZeroShot, thumbs: Thumbnails, limit: int
) -> dict[str, Any]:
    """Accuracy per class and confusions, for each alpha of the entry."""
    entry, _ = entry.available()
    test_set = entry.open()
    classes = list(test_set.classes)
    scorer = entry.scorer(predictor, test_set)
    wanted = set(regions.spread(len(test_set), limit).tolist())
    chosen: list[test_sets.Image] = []
    first: dict[int, int] = {}  # class -> position of its first image
    for position, image in enumerate(test_set.images(range(len(test_set)))):
        first.setdefault(image.label, position)
        if position in wanted:
            chosen.append(image)
    if -1 in first:
        raise test_sets.InputError(
            "the test set has images without a label, expected another split"
        )
    found = encode.gather_images(
        predictor, chosen, label="report", unreadable={}, regions=scorer.with_regions
    )
    seen, own = [chosen[i] for i in found.index], found.labels

    out = {"pictures": len(seen), "of": len(test_set), "classes": len(classes), "alphas": {}}
    for way, combined in scorer.of_batch(found).items():  # [n, C]
        if way.startswith(zeroshot.BY_NAME):
            continue
        alpha = float(way.removeprefix("alpha_"))
        hits = rates.topk_hits(combined, own, 1)
        out["alphas"][f"{alpha:g}"] = {
            "per_class": {
                name: [float(hits[own == c].sum()), int((own == c).sum())]
                for c, name in enumerate(classes)
                if (own == c).any()
            },
            "confusions": _confusions(combined, own, seen, test_set, first, thumbs),
        }
    return out


def _confusions(
    found: np.ndarray,
    own: np.ndarray,
    seen: Sequence[test_sets.Image],
    test_set: test_sets.TestSet,
    first: Mapping[int, int],
    thumbs: Thumbnails,
) -> list[dict[str, Any]]:
    """The most frequent pairs (true class, predicted class) by scores [n, C] and true classes int [n], with examples.

    `first`: class -> position of its first image in the set; a class may have none.
    """
    predicted, rows = found.argmax(axis=1), np.arange(len(own))
    lead = found[rows, predicted] - found[rows, own]  # of the wrong score over the true one
    pairs: dict[tuple[int, int], list[int]] = {}  # the images of each, the largest lead first
    for i in sorted(np.flatnonzero(lead > rates.TIE), key=lambda i: -lead[i]):
        pairs.setdefault((int(own[i]), int(predicted[i])), []).append(int(i))
    totals = collections.Counter(own.tolist())
    out = []
    for pair, mistaken in sorted(pairs.items(), key=lambda x: -len(x[1]))[:_PAIRS]:
        right = np.flatnonzero((own == pair[1]) & (predicted == pair[1])).tolist()
        example = None
        if right:
            example = seen[right[0]]
        elif pair[1] in first:
            place = first[pair[1]]
            (example,) = test_set.images(range(place, place + 1))
        out.append(
            {
                "true": test_set.classes[pair[0]],
                "predicted": test_set.classes[pair[1]],
                "count": len(mistaken),
                "of": totals[pair[0]],
                "pictures": [thumbs.add(seen[i], _SMALL) for i in mistaken[:_EXAMPLES]],
                "example": example and thumbs.add(example, _SMALL),
            }
        )
    return out
