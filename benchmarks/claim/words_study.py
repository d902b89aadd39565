"""The commands of the fifth design (`words`): `python -m benchmarks.claim run|report --design 5`."""

import argparse
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from benchmarks.claim import (
    data,
    dense,
    dense_plan,
    design,
    results,
    runs,
    words,
    words_data,
    words_plan,
    words_report,
)

TABLE = results.TABLES / "words.tsv"
COLUMNS = results.columns_of(TABLE)
MEASURED = [name for name in COLUMNS if "/" in name]
_OF_REGIONS = (
    *("alpha_0.5", "alpha_0.0", "/box_iou", "/region_to_description_r1"),
    *("/region/", "/box_head/", "/likelihood/phrase", "grounding/phrase", "grounding_all/phrase"),
)
_OF_WORDS = ("/point/", "/likelihood/")


def read(path: pathlib.Path) -> dict[str, results.Result]:
    """Name -> row of every finished run. Raises ClaimError, see `results.checked`."""
    return results.checked(path, COLUMNS, words.settings_of, "words.py")


def planned(
    found: words_plan.Results, args: argparse.Namespace
) -> Mapping[str, list[design.ClaimRun]]:
    """The plan of these flags."""
    clothes = args.clothes is not None
    if args.command == "report":
        clothes = any(row["data"] == words.CLOTHES for row in found.values())
    return words_plan.plan(found, steps=args.steps, clothes=clothes)


def measured(run: design.ClaimRun, evals: Collection[str]) -> list[str]:
    """The columns of measures that say something of this run, with these evaluations."""
    base, weight = words.parts_of(run.arm)
    kinds = {*evals, *(("reranked_validation", "reranked_test") if weight else ())}
    found = [name for name in MEASURED if name.partition("/")[0] in kinds]
    out: list[str] = []
    if base != words.GRAIN:  # its queries learn no boxes
        out += _OF_REGIONS
    if weight is None:
        out += _OF_WORDS
    return [name for name in found if not any(part in name for part in out)]


def lacking(run: design.ClaimRun, row: results.Result, evals: Collection[str]) -> list[str]:
    """Columns that this run with these evaluations must have, and that its row has not."""
    losses = ["loss_image_caption", *(f"loss_{term}" for term in words.terms_of(run))]
    return [n for n in ("flops_per_step", *losses, *measured(run, evals)) if n not in row]


def reranked(main: pathlib.Path, views: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """Retrieval with reranking, the weight chosen on validation and stored with the model, as the columns have it.

    Args:
      main: folder of the data set.
      views: of it.
      folder: of the trained run.
    """
    import grain_jax
    from grain_jax.evaluate import retrieval

    predictor = grain_jax.load(folder)
    row = {}
    for split in dense.SPLITS:
        options: Any = words.annotated(main, views, f"both_{split}")
        options |= {"rerank": words.RERANKED, "choose_weight": split == "validation"}
        entry = retrieval.Retrieval(**options)
        found: Any = entry.evaluate(predictor)
        for way in ("image_to_text", "text_to_image"):
            row[f"reranked_{split}/{way}/r1"] = round(found["reranked"][way]["r1"], 6)
        row[f"reranked_{split}/weight"] = found["rerank_weight"]
    return row


def train(args: argparse.Namespace) -> int:
    """Trains and evaluates the run `args.run` in this process and appends its row; makes its data where missing."""
    found = read(args.results)
    run = next(one for one in dense_plan.order(planned(found, args)) if one.name == args.run)
    with data.alone(words.images_of(run.data), args.workdir):
        main = words_data.prepare(run.data, args.clothes, args.workdir)
    with data.alone(words.records_of(run), args.workdir):
        words_data.prepare_records(run, main, args.workdir)
    config = words.make_config(run, main, args.workdir)
    folder = args.workdir / "runs" / run.name
    row = runs.train(config, folder, {name: name for name in MEASURED})
    if words.terms_of(run):
        row |= reranked(main, args.workdir / "views" / words.images_of(run.data), folder)
    if missing := lacking(run, row, config.evals):
        raise results.ClaimError(
            f"{run.name}: got no {', '.join(missing)}, expected all measures of its arm"
        )
    kept = {*measured(run, config.evals)}
    row = {name: x for name, x in row.items() if name in kept or name not in MEASURED}
    about = {"design": words.DESIGN, "settings": words.settings_of(run)}
    results.append(args.results, {**about, **run._asdict(), **row}, COLUMNS)
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Trains every run that has no row yet, as many at a time as there are jobs; goes on where it was stopped."""
    read(args.results)
    for name in words.AVIARIES:  # on all cores
        words_data.prepare(name, None, args.workdir)
    names = lambda: [run.name for run in dense_plan.order(planned(read(args.results), args))]
    finished = lambda name: name in read(args.results)
    flags = ("workdir", "results", "steps", "clothes", "design")
    return runs.run_all("claim", args, names, finished, flags)


def print_report(args: argparse.Namespace) -> int:
    """Prints the tables and the bars."""
    found = read(args.results)
    words_report.report(planned(found, args), found, args.steps)
    return 0


COMMANDS = {"run": run_all, "report": print_report, "train": train}
