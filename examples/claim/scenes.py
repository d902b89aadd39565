"""GRAIN against CLIP on scenes of photographs: five arms on two versions of the boxes, three seeds each.

    python -m examples.scenes ... --output runs/scenes/data --seed 2    # examples/scenes/README.md
    for boxes in exact:A detected:detected; do
      grain-jax build --annotations runs/scenes/data/train/${boxes#*:}.jsonl --name ${boxes%:*} \\
        --images runs/scenes/data/train --output runs/scenes/data/records; done
    for boxes in exact detected; do
      for arm in clip clip_boxes clip_patches{,_agreement} grain{,_agreement} regions; do
        grain-jax sweep --config examples/claim/scenes.py:runs/scenes,$boxes,$arm --parallel 2 \\
          --sweep examples/claim/scenes.py --workdir runs/scenes/$boxes/$arm; done; done
    python -m examples.claim.scenes runs/scenes    # tables, and runs/scenes/scenes.tsv, which it also reads

All arms train L_ic and L_id on two captions. `clip` is two towers with attention pooling, the start of
`regions`, without boxes. `clip_boxes` adds the box head, and `clip_patches` boxes that patches predict,
which are its regions. Both have the FLOPs of `grain`, whose queries point at patches and read the box head.
`regions` is the decoder of `grain` on the frozen `clip` of its seed; both take boxes of patches as regions.
The arms with `_agreement` set `loss.agreement`.

Two numbers decide: top-1 of quiet phrases, and images that find their caption in groups of four. Validation
images choose the score and alpha of each arm, and its `model.boxes.object_weight`: the weight with the
greatest sum of phrases, AP50 and quiet top-1.
"""

import csv
import itertools
import pathlib
import sys
from collections.abc import Iterable, Sequence
from statistics import fmean

from ml_collections import FieldReference

from examples.claim import scores
from examples.claim import table as tables
from grain_jax.config.points import seeds
from grain_jax.configs import demo, regions
from grain_jax.evaluate.kinds import evaluator

STEPS, RATE, RATE_OF_REGIONS = 1500, 1e-3, 2e-3
BOXES = {"exact": "exact boxes", "detected": "boxes as a detector makes them"}
ARMS = {
    "clip": "CLIP",
    "clip_boxes": "CLIP, box head",
    "clip_patches": "CLIP, box head, boxes of patches",
    "clip_patches_agreement": "CLIP, box head, boxes of patches, agreement",
    "grain": "GRAIN",
    "grain_agreement": "GRAIN, agreement",
    "regions": "`regions:` on CLIP",
}
# At least the FLOPs of `grain`: by flops.per_image, an image has 258 MFLOP there, in these 237 and 241.
LONGER = {"clip_boxes": 1.15, "clip_patches": 1.08, "clip_patches_agreement": 1.08}
COLUMNS = {  # heading -> key, where {} is the sort of regions, and factor
    **{x: y for x, y in tables.COLUMNS.items() if y[0].startswith(("groups", "retrieval"))},
    "phrases": ("test/{}/phrase_acc50", 100),
    "of another image": ("test/{}/phrase_acc50_other_image", 100),
    "IoU of phrases": ("test/{}/phrase_iou", 1),
    "matched IoU": ("test/{}/box_iou", 1),
    "AP50": ("test/{}/ap50", 100),
    "region R@1": ("test/{}/region_to_description_r1", 100),
}
_RUN = ("boxes", "arm", "seed")


def sweep():
    """Three seeds of weights and of the order of the data; the images are the same."""
    yield from seeds(3)


def get_config(argument: str):
    """The config of "FOLDER,BOXES,ARM"."""
    folder, boxes, arm = argument.split(",")
    c = demo.get_config()
    c.model.image.update(image_size=96, patch_size=12)
    c.model.decoder.queries = c.input.max_regions = 5
    c.total_steps = round(STEPS * LONGER.get(arm, 1))
    c.optim.update(learning_rate=RATE, warmup_steps=100)
    c.report_images, c.checkpoint_every = 0, 500
    c.input.update(prepare=None, data_dir=f"{folder}/data/records", name=boxes)
    if arm == "regions":  # on the run of `clip` with the same seed
        added = regions.get_config(f"{folder}/exact/clip/seed=0")
        added.model.decoder.update({**c.model.decoder, "image_pool": "tower"})
        c.model, c.loss, c.init = added.model, added.loss, added.init
        c.optim.frozen, c.optim.learning_rate = added.optim.frozen, RATE_OF_REGIONS
        c.init.image = FieldReference(f"{folder}/exact/clip/seed=") + c.get_ref("seed").to_str()
        c.init.text = c.init.get_ref("image")
    elif arm.startswith("clip"):
        c.model.decoder, c.model.image.pool = None, "map"
        c.loss.region_description, c.loss.deep_supervision = 0.0, False
        c.loss.box *= arm.startswith("clip_patches")
    c.loss.agreement = arm.endswith("_agreement")
    c.model.boxes.proposals = arm not in ("clip", "clip_boxes")
    if arm == "clip":
        c.model.boxes.kind, c.loss.box_description = "none", 0.0
    evals, data = {}, f"{folder}/data"
    for name in ("quiet", "seen", "validation/quiet", "validation/seen"):
        how = dict(descriptions=f"{data}/{name}.json", names=False)
        evals[name.replace("/", "_")] = evaluator("examples.claim.scores:Scores", f"{data}/{name}", **how)
    for name, kind in (("groups", "examples.evaluator.groups:Groups"), ("retrieval", "retrieval")):
        evals[name] = evaluator(kind, f"{data}/test", annotations=f"{data}/test/A.jsonl")
    for split in ("validation", "test") if c.model.decoder or c.model.boxes.proposals else ():
        files = dict(annotations=f"{data}/{split}/A.jsonl", instances=f"{data}/{split}/instances.json")
        evals[split] = evaluator("examples.claim.scores:Regions", f"{data}/{split}", **files)
    c.evals = evals
    return c


Runs = dict[tuple[str, ...], dict[str, float]]  # (boxes, arm, seed) -> number by name


def read(folder: pathlib.Path) -> Runs:
    """The runs of `scenes.tsv` in the folder, if it is there, and the finished runs below it, which win."""
    runs, file = {}, folder / "scenes.tsv"
    lines = file.read_text().splitlines() if file.exists() else ()
    for line in csv.DictReader(lines, delimiter="\t"):
        run = tuple(line.pop(name) for name in _RUN)
        runs[run] = {name: float(x) for name, x in line.items() if x}
    for boxes, arm in itertools.product(BOXES, ARMS):
        for path in sorted((folder / boxes / arm).glob("seed=*")):
            if numbers := tables.read(path):
                runs[boxes, arm, path.name.removeprefix("seed=")] = numbers
    return runs


def write(runs: Runs, file: pathlib.Path) -> None:
    """Every number of every run, tab-separated, a run per line."""
    names = dict.fromkeys(name for numbers in runs.values() for name in numbers)
    with file.open("w") as out:
        lines = csv.DictWriter(out, [*_RUN, *names], delimiter="\t", lineterminator="\n")
        lines.writeheader()
        for run, numbers in runs.items():
            lines.writerow(dict(zip(_RUN, run)) | {name: f"{x:.4g}" for name, x in numbers.items()})


def best(rows: Sequence[tables.Row], keys: Iterable[str]) -> str:
    """The key with the greatest mean over seeds."""
    return max(keys, key=lambda key: fmean(row[key] for row in rows))


def ways(rows: Sequence[tables.Row]) -> dict[str, str]:
    """For each sort of regions that the runs of an arm have, its name in the table and among the metrics."""
    weights = {key.split("/")[1] for key in rows[0] if key.startswith("validation/w_")}
    sorts = {"by queries": "queries"} if "validation/queries/ap50" in rows[0] else {}

    def merit(way: str) -> float:
        quiet = [f"validation_quiet/{way}/alpha_{alpha}/top1" for alpha in scores.ALPHAS]
        keys = best(rows, quiet), *(f"validation/{way}/{x}" for x in ("phrase_acc50", "ap50"))
        return sum(fmean(row[key] for row in rows) for key in keys)

    if weights:
        weight = max(sorted(weights), key=merit)
        sorts[f"proposals, {weight.replace('_', ' ')}"] = weight
    return sorts or {"": ""}


def table(runs: Runs, boxes: str) -> str:
    """A table of one version of the boxes, as Markdown: per arm the quiet phrases by seed, and means.

    An arm has a row for each sort of its regions (`ways`). A row shows the score with the best mean over
    seeds of quiet phrases on validation images. Images, fixed boxes and these regions have scores.
    """
    lines = []
    for arm, label in ARMS.items():
        rows = [numbers for run, numbers in runs.items() if run[:2] == (boxes, arm)]
        for shown, way in ways(rows).items() if rows else ():
            allowed = {"image", "windows", "parts", way} | ({"mean", "best"} if way == "queries" else set())
            tried = [x for x in rows[0] if x.startswith("validation_quiet/") and x.split("/")[1] in allowed]
            score = best(rows, [x for x in tried if x.endswith("/top1")]).partition("/")[2]
            quiet, seen = ([100 * row[f"{part}/{score}"] for row in rows] for part in ("quiet", "seen"))
            cells = [f"{label}{shown and ', '}{shown}", score.removesuffix("/top1").replace("/alpha_", ", ")]
            cells += [", ".join(f"{x:.1f}" for x in quiet), f"{fmean(quiet):.3g}", f"{fmean(seen):.3g}"]
            lines.append(cells + tables.means(rows, {k: (x.format(way), f) for k, (x, f) in COLUMNS.items()}))
    return tables.markdown(["arm", "score", "quiet, by seed", "quiet", "seen", *COLUMNS], lines)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    runs = read(folder)
    for boxes, heading in BOXES.items():
        print(f"{heading}\n\n{table(runs, boxes)}\n")
    write(runs, folder / "scenes.tsv")
