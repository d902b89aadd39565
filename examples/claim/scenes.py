"""GRAIN against CLIP on scenes of photographs: seven arms, one sweep each.

    python -m examples.scenes ... --output runs/scenes/data --seed 2    # examples/scenes/README.md
    grain-jax build --annotations runs/scenes/data/train/A.jsonl --images runs/scenes/data/train \\
      --output runs/scenes/data/records --name scenes
    for arm in clip clip_long clip_boxes clip_boxes_long grain grain_boxes regions; do
      grain-jax sweep --config examples/claim/scenes.py:runs/scenes,$arm --sweep examples/claim/scenes.py \\
        --workdir runs/scenes/$arm --parallel 2; done
    python -m examples.claim.scenes runs/scenes

All arms train L_ic and L_id on two captions. `clip` is two towers with attention pooling; `regions` starts from the
`clip` of its seed. A long arm has the FLOPs of the GRAIN arm with the same head. Two numbers decide: top-1 of quiet
phrases (alpha 0.5 if the model has regions), and images that find their caption in groups of four.
"""

import json
import math
import pathlib
import sys
from statistics import fmean
from typing import Any

from ml_collections import FieldReference

from grain_jax.config.points import seeds
from grain_jax.configs import demo, regions
from grain_jax.evaluate.kinds import evaluator

STEPS, RATE, RATE_OF_REGIONS = 1500, 1e-3, 2e-3
LONGER = 1.1  # steps of a long arm, in those of the GRAIN arm
ARMS = {
    "clip": "CLIP",
    "clip_long": "CLIP, FLOPs of GRAIN",
    "clip_boxes": "CLIP, box head",
    "clip_boxes_long": "CLIP, box head, FLOPs of GRAIN",
    "grain": "GRAIN",
    "grain_boxes": "GRAIN, box head",
    "regions": "`regions:` on CLIP",
}
# Heading -> key of results.json, and factor. The first two decide.
COLUMNS = {
    "quiet": ("quiet/alpha_{}/top1", 100),
    "in groups": ("groups/image_to_text", 100),
    "seen": ("seen/alpha_{}/top1", 100),
    "R@1 to text": ("retrieval/image_to_text/r1", 100),
    "to image": ("retrieval/text_to_image/r1", 100),
    "IoU": ("grounding/box_iou", 1),
    "phrases": ("grounding/phrase_acc50", 100),
    "of another image": ("grounding/phrase_acc50_other_image", 100),
    "AP50": ("detection/ap50", 100),
}


def sweep():
    """Three seeds of weights and of the order of the data; the images are the same."""
    yield from seeds(3)


def get_config(argument: str):
    """The config of "FOLDER,ARM"."""
    folder, arm = argument.split(",")
    c = demo.get_config()
    c.model.image.update(image_size=96, patch_size=12)
    c.model.decoder.queries = c.input.max_regions = 5
    c.total_steps = round(STEPS * (LONGER if "long" in arm else 1))
    c.optim.update(learning_rate=RATE, warmup_steps=100)
    c.pictures, c.checkpoint_every = 0, 500
    c.input.update(prepare=None, data_dir=f"{folder}/data/records", name="scenes")
    if arm == "regions":
        _on_clip(c, folder)
    elif arm.startswith("clip"):
        c.model.decoder, c.model.image.pool = None, "map"
        c.loss.box, c.loss.region_description, c.loss.deep_supervision = 0.0, 0.0, False
    if "boxes" not in arm and arm != "regions":
        c.model.boxes.kind, c.loss.box_description = "none", 0.0
    c.evals = _evaluators(f"{folder}/data", regions=c.model.decoder is not None)
    return c


def _on_clip(c, folder: str) -> None:
    """`regions:` on the run of `clip` with the same seed; settings as in `c`."""
    added = regions.get_config(f"{folder}/clip/seed=0")
    added.model.decoder.update({**c.model.decoder, "image_pool": "tower"})
    c.model, c.loss, c.init = added.model, added.loss, added.init
    c.optim.frozen, c.optim.learning_rate = added.optim.frozen, RATE_OF_REGIONS
    c.init.image = FieldReference(f"{folder}/clip/seed=") + c.get_ref("seed").to_str()
    c.init.text = c.init.get_ref("image")


def _evaluators(data: str, regions: bool) -> dict[str, Any]:
    """The measurements, on scenes with places that training never shows."""
    alphas, evals = ((1.0, 0.5, 0.0) if regions else (1.0,)), {}
    for name in ("quiet", "seen"):
        how = dict(descriptions=f"{data}/{name}.json", names=False, alphas=alphas)
        evals[name] = evaluator("zeroshot", f"{data}/{name}", **how)
    kinds = {"groups": "examples.evaluator.groups:Groups", "retrieval": "retrieval"}
    for name, kind in (kinds | ({"grounding": "grounding"} if regions else {})).items():
        evals[name] = evaluator(kind, f"{data}/test", annotations=f"{data}/test/A.jsonl")
    if regions:
        where = dict(annotations=f"{data}/test/instances.json")
        evals["detection"] = evaluator("detection", f"{data}/test", **where)
    return evals


def table(folder: pathlib.Path) -> str:
    """The table, as Markdown: per arm the top-1 of quiet phrases by seed, and means over the seeds."""
    lines = [["arm", "quiet, by seed", *COLUMNS], ["---"] + ["---:"] * (1 + len(COLUMNS))]
    for arm, label in ARMS.items():
        files = sorted((folder / arm).glob("seed=*/results.json"))
        if not (rows := [json.loads(file.read_text()) for file in files]):
            continue
        means, quiet, alpha = [], "", 0.5 if "eval/quiet/alpha_0.5/top1" in rows[0] else 1.0
        for key, factor in COLUMNS.values():
            values = [factor * row.get(f"eval/{key.format(alpha)}", math.nan) for row in rows]
            quiet = quiet or ", ".join(f"{x:.1f}" for x in values)
            means.append("" if math.isnan(values[0]) else f"{fmean(values):.3g}")
        lines.append([label, quiet, *means])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(table(pathlib.Path(sys.argv[1])))
