"""GRAIN against CLIP on scenes of photographs: seven arms on two versions of the boxes, three seeds each.

    python -m examples.scenes ... --output runs/scenes/data --seed 2    # examples/scenes/README.md
    for boxes in exact:A detected:detected; do
      grain-jax build --annotations runs/scenes/data/train/${boxes#*:}.jsonl --name ${boxes%:*} \\
        --images runs/scenes/data/train --output runs/scenes/data/records; done
    for boxes in exact detected; do
      for arm in clip clip_boxes grain_boxes pointer reads both plain regions; do
        grain-jax sweep --config examples/claim/scenes.py:runs/scenes,$boxes,$arm --parallel 2 \\
          --sweep examples/claim/scenes.py --workdir runs/scenes/$boxes/$arm; done; done
    python -m examples.claim.scenes runs/scenes    # tables, and runs/scenes/scenes.tsv, which it also reads

All arms train L_ic and L_id on two captions. `clip` is two towers with attention pooling, the start of
`regions`, without boxes. `clip_boxes` adds the box head, and has the FLOPs of the largest arm. `grain_boxes`
has queries with boxes. In `pointer` they point at patches, in `reads` they read the box head, in `both` both.
`plain` has the pointer without a box head. `regions` has both, on the frozen `clip` of its seed.

Two numbers decide: top-1 of quiet phrases, and images that find their caption in groups of four. The score of
quiet phrases and its alpha are those with the best mean over seeds on validation images.
"""

import itertools
import json
import math
import pathlib
import re
import sys
from statistics import fmean
from typing import Any

from ml_collections import FieldReference

from grain_jax.config.points import seeds
from grain_jax.configs import demo, regions
from grain_jax.evaluate.kinds import evaluator

STEPS, RATE, RATE_OF_REGIONS = 1500, 1e-3, 2e-3
LONGER = 1.15  # times the steps of the other arms, for `clip_boxes`
BOXES = {"exact": "exact boxes", "detected": "boxes as a detector makes them"}
ARMS = {
    "clip": "CLIP",
    "clip_boxes": "CLIP, box head, FLOPs of GRAIN",
    "grain_boxes": "GRAIN, box head",
    "pointer": "+ pointer",
    "reads": "+ reads",
    "both": "+ pointer and reads",
    "plain": "GRAIN, pointer, no box head",
    "regions": "`regions:` on CLIP, pointer and reads",
}
# Heading -> key of results.json, and factor; beside quiet and seen phrases by the chosen score.
COLUMNS = {
    "in groups": ("groups/image_to_text", 100),
    "R@1 to text": ("retrieval/image_to_text/r1", 100),
    "to image": ("retrieval/text_to_image/r1", 100),
    "IoU": ("grounding/box_iou", 1),
    "phrases": ("grounding/phrase_acc50", 100),
    "of another image": ("grounding/phrase_acc50_other_image", 100),
    "AP50": ("detection/ap50", 100),
    "region R@1": ("grounding/region_to_description_r1", 100),
}
_PARTS = ("quiet", "seen")
_SCORED = re.compile(r"(validation_)?(quiet|seen)/.*/top1")
_CHOSEN_ON = "validation_quiet/"


def sweep():
    """Three seeds of weights and of the order of the data; the images are the same."""
    yield from seeds(3)


def get_config(argument: str):
    """The config of "FOLDER,BOXES,ARM"."""
    folder, boxes, arm = argument.split(",")
    c = demo.get_config()
    c.model.image.update(image_size=96, patch_size=12)
    c.model.decoder.queries = c.input.max_regions = 5
    c.model.decoder.boxes = "pointer" if arm in ("pointer", "both", "plain", "regions") else "query"
    c.model.decoder.reads_box = arm in ("reads", "both", "regions")
    c.total_steps = round(STEPS * (LONGER if arm == "clip_boxes" else 1))
    c.optim.update(learning_rate=RATE, warmup_steps=100)
    c.report_images, c.checkpoint_every = 0, 500
    c.input.update(prepare=None, data_dir=f"{folder}/data/records", name=boxes)
    if arm == "regions":
        _on_clip(c, folder)
    elif arm.startswith("clip"):
        c.model.decoder, c.model.image.pool = None, "map"
        c.loss.box, c.loss.region_description, c.loss.deep_supervision = 0.0, 0.0, False
    if arm in ("clip", "plain"):
        c.model.boxes.kind, c.loss.box_description = "none", 0.0
    c.evals = _evaluators(f"{folder}/data", regions=c.model.decoder is not None)
    return c


def _on_clip(c, folder: str) -> None:
    """`regions:` on the run of `clip` with the same seed; settings as in `c`."""
    added = regions.get_config(f"{folder}/exact/clip/seed=0")
    added.model.decoder.update({**c.model.decoder, "image_pool": "tower"})
    c.model, c.loss, c.init = added.model, added.loss, added.init
    c.optim.frozen, c.optim.learning_rate = added.optim.frozen, RATE_OF_REGIONS
    c.init.image = FieldReference(f"{folder}/exact/clip/seed=") + c.get_ref("seed").to_str()
    c.init.text = c.init.get_ref("image")


def _evaluators(data: str, regions: bool) -> dict[str, Any]:
    """The measurements, on scenes with places that training never shows."""
    evals = {}
    for name in (*_PARTS, *(f"validation/{part}" for part in _PARTS)):
        how = dict(descriptions=f"{data}/{name}.json", names=False)
        kind = "examples.claim.scores:Scores"
        evals[name.replace("/", "_")] = evaluator(kind, f"{data}/{name}", **how)
    kinds = {"groups": "examples.evaluator.groups:Groups", "retrieval": "retrieval"}
    for name, kind in (kinds | ({"grounding": "grounding"} if regions else {})).items():
        evals[name] = evaluator(kind, f"{data}/test", annotations=f"{data}/test/A.jsonl")
    if regions:
        where = dict(annotations=f"{data}/test/instances.json")
        evals["detection"] = evaluator("detection", f"{data}/test", **where)
    return evals


Runs = dict[tuple[str, str, str], dict[str, float]]  # (boxes, arm, seed) -> number by name


def read(folder: pathlib.Path) -> Runs:
    """The runs of `scenes.tsv` in the folder, if it is there, and the finished runs below it, which win."""
    runs, file = {}, folder / "scenes.tsv"
    if file.exists():
        names, *lines = (line.split("\t") for line in file.read_text().splitlines())
        for boxes, arm, seed, *numbers in lines:
            pairs = zip(names[3:], numbers, strict=True)
            runs[boxes, arm, seed] = {name: float(x) for name, x in pairs if x}
    for boxes, arm in itertools.product(BOXES, ARMS):
        for path in sorted((folder / boxes / arm).glob("seed=*/results.json")):
            numbers = json.loads(path.read_text()).items()
            numbers = {name.removeprefix("eval/"): x for name, x in numbers}
            chosen = {name: numbers[name] for name, _ in COLUMNS.values() if name in numbers}
            chosen |= {x: y for x, y in numbers.items() if _SCORED.fullmatch(x)}
            runs[boxes, arm, path.parent.name.removeprefix("seed=")] = chosen
    order = list(itertools.product(BOXES, ARMS))
    return dict(sorted(runs.items(), key=lambda run: (order.index(run[0][:2]), run[0][2])))


def write(runs: Runs, file: pathlib.Path) -> None:
    """Every number of every run, tab-separated, a run per line."""
    names = list(dict.fromkeys(name for numbers in runs.values() for name in numbers))
    lines = [["boxes", "arm", "seed", *names]]
    for run, numbers in runs.items():
        lines.append([*run, *(f"{numbers[x]:.4g}" if x in numbers else "" for x in names)])
    file.write_text("".join("\t".join(cells) + "\n" for cells in lines))


def chosen_score(rows: list[dict[str, float]]) -> str:
    """ "SCORE/alpha_A": the best mean over seeds of quiet phrases on validation images."""
    names = [x.removeprefix(_CHOSEN_ON) for x in rows[0] if x.startswith(_CHOSEN_ON)]
    best = max(names, key=lambda x: fmean(row[_CHOSEN_ON + x] for row in rows))
    return best.removesuffix("/top1")


def table(runs: Runs, boxes: str) -> str:
    """A table of one version of the boxes, as Markdown: per arm the quiet phrases by seed, and means."""
    lines = [["arm", "score", "quiet, by seed", "quiet", "seen", *COLUMNS]]
    lines.append(["---"] * 2 + ["---:"] * (len(lines[0]) - 2))
    for arm, label in ARMS.items():
        rows = [numbers for run, numbers in runs.items() if run[:2] == (boxes, arm)]
        if not rows:
            continue
        score = chosen_score(rows)
        quiet, seen = ([100 * x[f"{part}/{score}/top1"] for x in rows] for part in _PARTS)
        by_seed = ", ".join(f"{x:.1f}" for x in quiet)
        cells = [label, score.replace("/alpha_", ", "), by_seed, *map(_short, (quiet, seen))]
        for name, factor in COLUMNS.values():
            cells.append(_short([factor * x.get(name, math.nan) for x in rows]))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _short(values: list[float]) -> str:
    return "" if math.isnan(values[0]) else f"{fmean(values):.3g}"


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    runs = read(folder)
    for boxes, heading in BOXES.items():
        print(f"{heading}\n\n{table(runs, boxes)}\n")
    write(runs, folder / "scenes.tsv")
