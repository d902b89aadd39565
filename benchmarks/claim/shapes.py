"""The sixth design of `benchmarks.claim`: what own shapes and fewer tokens bring. Settings (fixed before the first run), arms.

All arms are the recipe of design 3 with a box head, on an aviary whose images are from 1:3 to 3:1: `squares` squashes them,
`own` keeps their shape with as many patches, and `own+keep` trains on half of these until 80% of the run.
"""

import argparse
import hashlib
import json
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claim import (
    compared,
    data,
    dense,
    dense_data,
    dense_plan,
    dense_report,
    design,
    results,
    runs,
)
from grain_jax.config import recipe
from grain_jax.data.aviary import masks

DESIGN = 6
SEEDS, STEPS = dense.SEEDS, dense.STEPS
AVIARY = {**dense.AVIARY, "seed": 67, "ratios": 3.0}
SQUARES, OWN, KEEP = "squares", "own", "own+keep"
_OWN = {"input.sequence_lengths": (64,)}  # a square of 64 pixels has 8 x 8 patches
ARMS: dict[str, dict[str, Any]] = {
    SQUARES: {},
    OWN: _OWN,
    KEEP: {**_OWN, "model.image.keep": ((0.0, 0.5), (0.8, 1.0))},
}
LABELS = {
    SQUARES: "squashed to squares",
    OWN: "own shape",
    KEEP: "own shape, half of the patches until 80%",
}
CONTROLS = {OWN: SQUARES, KEEP: OWN}  # arm -> that over which its lead is reported
TABLE = results.TABLES / "shapes.tsv"
COLUMNS = results.columns_of(TABLE)
MEASURED = [name for name in COLUMNS if "/" in name]
ASKED = ("unseen", "iou", "miou", "to_text", "to_image", "region")  # seed by seed


def run_of(arm: str, seed: int, steps: int = STEPS) -> design.ClaimRun:
    """A run of this design."""
    return design.ClaimRun(arm, dense.RATE, seed, steps, dense.MAIN)


def changes(run: design.ClaimRun) -> dict[str, Any]:
    """The changes of the run to `design.CONFIG`, without paths."""
    recipe_of_all = run._replace(arm=dense.RECIPES[dense.CONTROL])
    return {**design.changes(recipe_of_all, design.CONFIG), **ARMS[run.arm]}


def settings_of(run: design.ClaimRun) -> str:
    """Fingerprint of all settings that a run depends on."""
    entries = _entries(pathlib.Path("main"), pathlib.Path("views"))
    text = json.dumps([changes(run), AVIARY, design.CONFIG, entries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_config(run: design.ClaimRun, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The config of a run with its evaluations.

    Args:
      run: of this design.
      main: folder of its data set.
      work: folder with records and views (`dense_data.prepare_aviary`).
    """
    c = runpy.run_path(design.CONFIG)["get_config"]()
    c.update_from_flattened_dict(changes(run))
    c.total_epochs = c.input.prepare = c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(work / "records"), run.data
    entries = _entries(main, work / "views" / run.data)
    made = {name: recipe.evaluator(kind, **options) for name, (kind, options) in entries.items()}
    c.evals = recipe.ConfigDict(made)
    return c


def _entries(main, views) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind and options of each evaluation: those of design 4 on test images."""
    annotated = lambda name: dict(images=str(main / "test"), annotations=str(views / name))
    templates = str(main / masks.FOLDER / masks.TEMPLATES)
    maps = dense.segmentations(views, True)
    evals = dense.zero_shot(main, views, (1.0, 0.5))
    evals |= {
        "retrieval_test": ("retrieval", annotated("both_test.jsonl")),
        "grounding": ("grounding", annotated("unseen_test.jsonl")),
        **{
            name: ("segmentation", maps[name] | dict(templates=templates))
            for name in ("parts", "parts_regions", "parts_both")
        },
    }
    return evals


def plan(found: Mapping[str, results.Result], steps: int) -> dict[str, list[design.ClaimRun]]:
    """Study -> its runs; that of equal FLOPs once the first runs of equal steps tell the FLOPs of a step."""
    studies = {"equal steps": [run_of(arm, seed, steps) for seed in SEEDS for arm in ARMS]}
    first = [found.get(run_of(arm, SEEDS[0], steps).name) for arm in (OWN, KEEP)]
    if all(first):
        own, kept = (row["flops_per_step"] for row in first)
        fair = dense_plan.equal_steps(steps, own, kept)
        studies["equal FLOPs"] = [
            run_of(arm, seed, fair if arm == KEEP else steps)
            for seed in SEEDS
            for arm in (OWN, KEEP)
        ]
    return studies


def read(path: pathlib.Path) -> dict[str, results.Result]:
    """Name -> row of every finished run. Raises ClaimError, see `results.checked`."""
    return results.checked(path, COLUMNS, settings_of, "shapes.py")


def _planned(args: argparse.Namespace) -> list[design.ClaimRun]:
    return dense_plan.order(plan(read(args.results), args.steps))


def train(args: argparse.Namespace) -> int:
    """Trains and evaluates the run `args.run` in this process and appends its row; makes its data where missing."""
    run = next(one for one in _planned(args) if one.name == args.run)
    with data.alone(run.data, args.workdir):
        main = dense_data.prepare_aviary(run.data, AVIARY, args.workdir)
    config = make_config(run, main, args.workdir)
    row = runs.train(config, args.workdir / "runs" / run.name, {name: name for name in MEASURED})
    if missing := [name for name in ("flops_per_step", *MEASURED) if name not in row]:
        raise results.ClaimError(f"{run.name}: got no {', '.join(missing)}, expected all measures")
    about = {"design": DESIGN, "settings": settings_of(run)}
    results.append(args.results, {**about, **run._asdict(), **row}, COLUMNS)
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Trains every run that has no row yet, as many at a time as there are jobs; goes on where it was stopped."""
    read(args.results)
    dense_data.prepare_aviary(dense.MAIN, AVIARY, args.workdir)  # on all cores
    names = lambda: [run.name for run in _planned(args)]
    finished = lambda name: name in read(args.results)
    return runs.run_all("claim", args, names, finished, ("workdir", "results", "steps", "design"))


def print_report(args: argparse.Namespace) -> int:
    """Prints the tables."""
    found = read(args.results)
    for study, of_study in plan(found, args.steps).items():
        arms = compared.grouped(of_study, found)
        if arms:
            _print(study, arms)
    return 0


def _print(study: str, arms: Mapping[str, Sequence[results.Result]]) -> None:
    print(f"## {study[0].upper()}{study[1:]}\n")
    measures = dense_report.MEASURES
    compared.print_costs(arms, LABELS.__getitem__)
    compared.print_measures(arms, LABELS.__getitem__, measures, ASKED)
    control = lambda arm: CONTROLS.get(arm, arm)
    compared.print_leads(arms, LABELS.__getitem__, measures, control, "lead over the arm above")


COMMANDS = {"run": run_all, "report": print_report, "train": train}
