"""What box heads and hard negatives bring, and what they cost the rest, on the aviary: three seeds, equal steps.

    python -m benchmarks.claim.regions run     trains every run that has no row in the table of results; may be
                                               stopped at any time and started again
    python -m benchmarks.claim.regions report  prints the tables (Markdown)

All arms are the recipe that won in docs/claim.md with other keys of `model.boxes` and of the losses; data, towers,
batch, schedule and learning rate are the same.
"""

import argparse
import pathlib
import runpy
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.claim import data, design, measures, report, results, runs
from grain_jax.config import recipe

SEEDS = (0, 1, 2)
STEPS = 500
RATE = 1e-3
NEGATIVES = 10  # of a region; a step sees 3 of them
AVIARY = {**design.AVIARY, "seed": 29, "negatives": NEGATIVES}

_ROI = {"model.boxes.kind": "roi_align", "loss.box_description": 1.0}
_PROMPTER = {"model.boxes.kind": "prompter", "loss.box_description": 1.0}
_NEGATIVES = {"input.negatives_per_region": 3, "loss.hard_negative": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "neither": {},
    "roi_align": _ROI,
    "roi_align_3": {**_ROI, "model.boxes.bins": 3},
    "prompter": _PROMPTER,
    "negatives": _NEGATIVES,
    "prompter_negatives": {**_PROMPTER, **_NEGATIVES},
    # After the results of the others.
    "roi_align_3_negatives": {**_ROI, "model.boxes.bins": 3, **_NEGATIVES},
}
# Column of the table -> name in results.json.
MEASURES = {
    "seen": "seen/alpha_1.0/top1",
    "unseen": "unit/alpha_1.0/top1",
    "unseen_half": "unseen/alpha_0.5/top1",
    "to_text": "retrieval/image_to_text/r1",
    "to_image": "retrieval/text_to_image/r1",
    "iou": "grounding/box_iou",
    "region_r1": "grounding/region_to_description_r1",
    "box_region": "boxes/region/top1",
    "box_head": "boxes/box_head/top1",
    "near_region": "hard_negatives/region/top1",
    "near_head": "hard_negatives/box_head/top1",
    "pointing": "maps/pointing",
    "map_iou": "maps/map_iou",
}
TABLE = results.TABLES / "regions.tsv"
COLUMNS = results.columns_of(TABLE)


def make_config(arm: str, seed: int, folder: pathlib.Path, steps: int) -> Any:
    """The config of a run, with its evaluations."""
    c = runpy.run_path(design.CONFIG)["get_config"]()
    run = design.ClaimRun(design.OURS, RATE, seed, steps)
    c.update_from_flattened_dict({**design.changes(run, design.CONFIG), **ARMS[arm]})
    c.total_epochs = c.input.prepare = c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(folder / "records"), "regions"
    images = folder / "aviary"
    unseen = dict(images=str(images / "unseen"), names=False)
    unseen |= dict(descriptions=str(images / "unseen.json"))
    test = dict(images=str(images / "test"), annotations=str(images / "test" / "A.jsonl"))
    evals = {
        "seen": ("zeroshot", dict(images=str(images / "seen"), alphas=(1.0,))),
        "unseen": ("zeroshot", unseen | dict(alphas=(0.5,))),
        "unit": ("zeroshot", unseen | dict(alphas=(1.0,), unit_features=True)),
        "retrieval": ("retrieval", test),
        "grounding": ("grounding", test),
        "boxes": ("boxes", test | dict(templates=str(folder / "templates.txt"))),
        "hard_negatives": ("hard_negatives", test | dict(negatives=NEGATIVES)),
        "maps": ("maps", test),
    }
    made = {name: recipe.evaluator(kind, **options) for name, (kind, options) in evals.items()}
    c.evals = recipe.ConfigDict(made)
    return c


def train(args: argparse.Namespace) -> int:
    """Trains and evaluates the run ARM-SEED and appends its row."""
    arm, _, seed = args.run.rpartition("-")
    config = make_config(arm, int(seed), args.workdir, args.steps)
    row = runs.train(config, args.workdir / "runs" / args.run, MEASURES)
    row |= {"arm": arm, "seed": seed, "steps": args.steps}
    results.append(args.results, row, COLUMNS)
    return 0


def read(path: pathlib.Path) -> dict[str, results.Result]:
    """ARM-SEED -> row of every finished run."""
    return {f"{row['arm']}-{row['seed']}": row for row in results.rows(path, COLUMNS)}


def run_all(args: argparse.Namespace) -> int:
    """Draws the data and trains every run without a row, as many at a time as there are jobs."""
    data.draw(args.workdir / "aviary", args.workdir / "records", "regions", AVIARY)
    (args.workdir / "templates.txt").write_text("{}\n")
    return runs.run_all(
        "claim.regions",
        args,
        lambda: [f"{arm}-{seed}" for seed in SEEDS for arm in ARMS],
        lambda name: name in read(args.results),
        ("workdir", "results", "steps"),
    )


def print_report(args: argparse.Namespace) -> int:
    """Prints the measures of each arm, mean and standard deviation over its seeds, and each seed's."""
    found, columns = read(args.results), ("flops_per_step", *MEASURES)
    rows = [[column, *(_cell(found, arm, column) for arm in ARMS)] for column in columns]
    print(report.table(["measure", *ARMS], rows))
    return 0


def _cell(found: Mapping[str, results.Result], arm: str, column: str) -> str:
    kept = [found[name] for seed in SEEDS if (name := f"{arm}-{seed}") in found]
    values = [row[column] for row in kept if column in row]
    if column == "flops_per_step":
        return f"{values[0] / 1e9:.1f} GF" if values else ""
    scale, digits = (1, 3) if column in ("iou", "map_iou") else (100, 1)
    mean = measures.spread(values, scale, digits) if values else "-"
    each = ", ".join(f"{scale * x:.{digits}f}" for x in values)
    return f"{mean} ({each})" if len(values) > 1 else mean


def main() -> int:
    """Runs one command; returns the exit status."""
    commands = {"run": run_all, "report": print_report, "train": train}
    parser = runs.parser("benchmarks.claim.regions", __doc__, commands, STEPS)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/regions"))
    parser.add_argument("--results", type=pathlib.Path, default=TABLE)
    return runs.call(parser.prog, commands, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
