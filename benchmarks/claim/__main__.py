"""Tests the claim: do regions and words in the global embedding beat CLIP at equal data and compute?

    python -m benchmarks.claim run     trains every run that has no row in the table of results; may be stopped at
                                       any time and started again
    python -m benchmarks.claim report  prints the tables (Markdown) and draws the charts

Arms differ in the few keys of `design.ARMS`. Half of the held-out classes choose the learning rate, the other half is
reported. docs/claim.md lists what was fixed before the first run, and the results.

With your own data: --data DIR, a folder with
    A.jsonl                           training annotations (data/SCHEMA.md), images below DIR
    seen/CLASS/*, unseen/CLASS/*      images of classes that captions name, and of held-out classes
    unseen.json                       {"class": ["description", ...]} of the held-out classes
    test/A.jsonl, test/seen.jsonl, test/unseen.jsonl   annotations below DIR/test, for retrieval and grounding
and --config FILE for a larger model (default: configs/demo.py).

The fourth design, of the local loss terms (`dense`), the fifth, of the text decoder (`words`), and the sixth, of own
shapes and fewer tokens (`shapes`): run --design N and report --design N. With --clothes DIR, a folder that
`python -m benchmarks.fetch fashion` made, run of the fourth and fifth also trains on clothes.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping

from benchmarks.claim import (
    data,
    dense,
    dense_study,
    design,
    report,
    results,
    runs,
    schedule,
    shapes,
    words,
    words_study,
)


def train(run: design.ClaimRun, args: argparse.Namespace) -> int:
    """Trains and evaluates one run in this process and appends its row to the table; makes its data where missing."""
    with data.alone(run.data, args.workdir):
        main = data.prepare(run.data, args.data, args.workdir)
    config = design.make_config(run, args.config, main, args.workdir)
    about = {"design": design.DESIGN, "settings": design.settings_of(run, args.config)}
    measures = {name: name for name in results.MEASURED}
    row = runs.train(config, args.workdir / "runs" / run.name, measures)
    results.append(args.results, {**about, **run._asdict(), **row})
    return 0


def train_named(args: argparse.Namespace) -> int:
    """Trains the run `args.run` of the plan."""
    planned = schedule.order(make_plan(results.read(args.results), args))
    return train(next(run for run in planned if run.name == args.run), args)


def make_plan(
    found: Mapping[str, results.Result], args: argparse.Namespace
) -> dict[str, list[design.ClaimRun]]:
    """The plan of these flags (`schedule.plan`)."""
    return schedule.plan(found, steps=args.steps, aviaries=args.data is None)


def check_results(found: Mapping[str, results.Result], config: str) -> None:
    """Raises ClaimError where a result has other settings than `design`."""
    for name, result in found.items():
        if design.settings_of(results.run_of(result), config) != result["settings"]:
            raise results.ClaimError(
                f"{name}: its result has other settings than benchmarks/claim/design.py; delete its row,"
                " or give another --results"
            )


def run_all(args: argparse.Namespace) -> int:
    """Trains every run that has no result yet, as many at a time as there are jobs."""
    check_results(results.read(args.results), args.config)
    data.prepare("main", args.data, args.workdir)  # on all cores
    planned = lambda: schedule.order(make_plan(results.read(args.results), args))
    return runs.run_all(
        "claim",
        args,
        lambda: [run.name for run in planned()],
        lambda name: name in results.read(args.results),
        ("workdir", "results", "config", "steps", "data"),
    )


def print_report(args: argparse.Namespace) -> int:
    """Prints the tables of the results, and with --all those of clothes, pilots and earlier designs."""
    found = results.read(args.results)
    check_results(found, args.config)
    report.report(make_plan(found, args), found, args.pictures)
    if args.all:
        print("# Clothes (Fashion-MNIST)\n")
        found = results.read(results.TABLES / "fashion.tsv")
        report.report(schedule.plan(found, steps=design.STEPS, aviaries=False), found, None)
        report.print_recorded((results.TABLES / "recorded.tsv").read_text())
    return 0


DESIGNS = {
    design.DESIGN: {"run": run_all, "report": print_report, "train": train_named},
    dense.DESIGN: dense_study.COMMANDS,
    words.DESIGN: words_study.COMMANDS,
    shapes.DESIGN: shapes.COMMANDS,
}
# Flag -> its default in each design, and below the folder of --data.
PLACES = {
    "workdir": (
        {
            design.DESIGN: "runs/claim",
            dense.DESIGN: "runs/claim_4",
            words.DESIGN: "runs/claim_5",
            shapes.DESIGN: "runs/claim_6",
        },
        "claim",
    ),
    "results": (
        {
            design.DESIGN: "benchmarks/claim/tables/claim.tsv",
            dense.DESIGN: "benchmarks/claim/tables/dense.tsv",
            words.DESIGN: "benchmarks/claim/tables/words.tsv",
            shapes.DESIGN: "benchmarks/claim/tables/shapes.tsv",
        },
        "claim/results.tsv",
    ),
    "pictures": (dict.fromkeys(DESIGNS, "docs"), "claim"),
}


def main() -> int:
    """Runs one command; returns the exit status."""
    parser = runs.parser("benchmarks.claim", __doc__, DESIGNS[design.DESIGN], design.STEPS)
    parser.add_argument("--design", type=int, choices=DESIGNS, default=design.DESIGN)
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of your own data")
    parser.add_argument("--config", default=design.CONFIG, metavar="FILE")
    parser.add_argument("--clothes", type=pathlib.Path, metavar="DIR", help="of designs 4 and 5")
    every = "report also clothes, pilots and the first two designs, as recorded"
    parser.add_argument("--all", action="store_true", help=every)
    for flag, (ours, own) in PLACES.items():
        said = f"default: {', '.join(dict.fromkeys(ours.values()))}; with --data: DIR/{own}"
        parser.add_argument(f"--{flag}", type=pathlib.Path, help=said)
    args = parser.parse_args()
    given = {"data": args.data, "config": args.config != design.CONFIG, "clothes": args.clothes}
    flags = {design.DESIGN: ("clothes",), shapes.DESIGN: tuple(given)}
    for flag in flags.get(args.design, ("data", "config")):
        if given[flag]:
            parser.error(f"--{flag}: got it with --design {args.design}, expected another design")
    for flag, (ours, own) in PLACES.items():
        if getattr(args, flag) is None:
            place = args.data / own if args.data else pathlib.Path(ours[args.design])
            setattr(args, flag, place)
    return runs.call(parser.prog, DESIGNS[args.design], args)


if __name__ == "__main__":
    sys.exit(main())
