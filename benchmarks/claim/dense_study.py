"""The commands of the fourth design (`dense`): `python -m benchmarks.claim run|report --design 4`."""

import argparse
import pathlib
from collections.abc import Collection, Mapping

from benchmarks.claim import (
    data,
    dense,
    dense_data,
    dense_plan,
    dense_report,
    design,
    results,
    runs,
)

TABLE = results.TABLES / "dense.tsv"
COLUMNS = results.columns_of(TABLE)
MEASURED = [name for name in COLUMNS if "/" in name]


def read(path: pathlib.Path) -> dict[str, results.Result]:
    """Name -> row of every finished run. Raises ClaimError, see `results.checked`."""
    return results.checked(path, COLUMNS, dense.settings_of, "dense.py")


def planned(
    found: dense_plan.Results, args: argparse.Namespace
) -> Mapping[str, list[design.ClaimRun]]:
    """The plan of these flags."""
    clothes = args.clothes is not None
    if args.command == "report":
        clothes = any(row["data"] == dense.CLOTHES for row in found.values())
    return dense_plan.plan(found, steps=args.steps, clothes=clothes)


def lacking(run: design.ClaimRun, row: results.Result, evals: Collection[str]) -> list[str]:
    """Columns that this run with these evaluations must have, and that its row has not."""
    base, terms = dense.parts_of(run.arm)
    measured = [name for name in MEASURED if name.partition("/")[0] in evals]
    if base != dense.CONTROL:
        measured.remove("unseen_test/alpha_0.5/top1")  # needs regions
    losses = [f"loss_{term}" for term in ("image_caption", *terms)]
    return [name for name in ("flops_per_step", *losses, *measured) if name not in row]


def train(args: argparse.Namespace) -> int:
    """Trains and evaluates the run `args.run` in this process and appends its row; makes its data where missing."""
    found = read(args.results)
    run = next(one for one in dense_plan.order(planned(found, args)) if one.name == args.run)
    with data.alone(run.data, args.workdir):
        main = dense_data.prepare(run.data, args.clothes, args.workdir)
    config = dense.make_config(run, main, args.workdir)
    row = runs.train(config, args.workdir / "runs" / run.name, {name: name for name in MEASURED})
    if missing := lacking(run, row, config.evals):
        raise results.ClaimError(
            f"{run.name}: got no {', '.join(missing)}, expected all measures of its arm"
        )
    about = {"design": dense.DESIGN, "settings": dense.settings_of(run)}
    results.append(args.results, {**about, **run._asdict(), **row}, COLUMNS)
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Trains every run that has no row yet, as many at a time as there are jobs; goes on where it was stopped."""
    read(args.results)
    dense_data.prepare(dense.MAIN, None, args.workdir)  # on all cores
    names = lambda: [run.name for run in dense_plan.order(planned(read(args.results), args))]
    finished = lambda name: name in read(args.results)
    flags = ("workdir", "results", "steps", "clothes", "design")
    return runs.run_all("claim", args, names, finished, flags)


def print_report(args: argparse.Namespace) -> int:
    """Prints the tables and the bars."""
    found = read(args.results)
    dense_report.report(planned(found, args), found)
    return 0


COMMANDS = {"run": run_all, "report": print_report, "train": train}
