"""Tests the claim: do regions and words in the global embedding beat CLIP at equal data and compute?

    python -m benchmarks.claim run     trains every run that has no row in the table of results; may be stopped at
                                       any time and started again
    python -m benchmarks.claim report  prints the tables (Markdown) and draws the charts

Every arm has the same towers, images, batch, schedule and grid of learning rates; arms differ in the few keys
of `claim_design.ARMS`. Half of the held-out classes choose the learning rate, the other half is reported.
docs/claim.md lists what was fixed before the first run, and the results.

With your own data: --data DIR, a folder with
    A.jsonl                           training annotations (data/SCHEMA.md), images below DIR
    seen/CLASS/*, unseen/CLASS/*      images of classes that captions name, and of held-out classes
    unseen.json                       {"class": ["description", ...]} of the held-out classes
    test/A.jsonl, test/seen.jsonl, test/unseen.jsonl   annotations below DIR/test, for retrieval and grounding
and --config FILE for a larger model (default: configs/demo.py).
"""

import argparse
import fcntl
import json
import os
import pathlib
import runpy
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from grain_jax.launch import jobs

from benchmarks import claim_data, claim_report, claim_results
from benchmarks import claim_design as design
from grain_jax import errors, recipe


def make_config(run: design.Run, file: str, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The config of a run: the file, the changes of the run, and the data set in `main`."""
    c = runpy.run_path(file)["get_config"]()
    changed = design.changes(run, file)
    c.update_from_flattened_dict(changed)
    c.total_epochs = c.input.prepare = None
    if "optim.warmup_steps" in changed:
        c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(work / "records"), run.data
    views = work / "views" / ("main" if run.data in design.NOISE else run.data)
    test = str(main / "test")
    regions = run.arm not in design.CLIP_ARMS
    described = dict(names=False, descriptions=str(main / "unseen.json"))
    unit = described | dict(unit_features=True, alphas=(1.0,))
    sentence = described | dict(descriptions=str(views / "sentences.json"), alphas=(1.0,))
    described["alphas"] = design.ALPHAS if regions else (1.0,)
    evals = {}
    for split in ("validation", "test"):
        unseen = str(views / f"unseen_{split}")
        evals[f"seen_{split}"] = recipe.evaluator(
            "zeroshot", str(views / f"seen_{split}"), alphas=(1.0,)
        )
        evals[f"unseen_{split}"] = recipe.evaluator("zeroshot", unseen, **described)
        evals[f"unit_{split}"] = recipe.evaluator("zeroshot", unseen, **unit)
        evals[f"sentence_{split}"] = recipe.evaluator("zeroshot", unseen, **sentence)
    evals["retrieval"] = recipe.evaluator("retrieval", test, annotations=f"{test}/A.jsonl")
    if regions:
        for group in ("seen", "unseen"):
            evals[f"grounding_{group}"] = recipe.evaluator(
                "grounding", test, annotations=f"{test}/{group}.jsonl"
            )
    c.evals = recipe.ConfigDict(evals)
    return c


def train(run: design.Run, args: argparse.Namespace) -> None:
    """Trains and evaluates one run in this process and appends its row to the table."""
    import jax

    from grain_jax import config as config_lib
    from grain_jax import train as trainer
    from grain_jax.models.grain import GRAIN
    from grain_jax.runtime import checkpoint, metrics_file
    from grain_jax.training import flops, optim, sharding, train_step

    main = args.data or args.workdir / ("main" if run.data in design.NOISE else run.data)
    config = config_lib.from_dict(make_config(run, args.config, main, args.workdir))
    workdir = args.workdir / "runs" / run.name
    began = time.monotonic()
    trainer.train(config, epath.Path(workdir))
    seconds = time.monotonic() - began
    config, _ = checkpoint.newest_config(workdir)  # with the numbers that it left open
    assert config is not None

    lines = [line.values for line in metrics_file.read([workdir / metrics_file.FILE])[0]]
    last = lines[-5:]
    speeds = sorted(line["images_per_second"] for line in lines)
    model = GRAIN(config.model, config.dtype, config.remat)
    tx = optim.optimizer(config.optim, lambda step: 0.0)
    state = jax.eval_shape(lambda: sharding.unbox(train_step.init_state(model, config, tx)))
    step_flops = flops.matmul_flops(
        lambda p, b: train_step.loss_and_grads(model, config, None, p, b, None),
        state.params,
        train_step.abstract_batch(config),
    )
    evaluated = json.loads((workdir / "results.json").read_text())
    result = {
        "design": design.DESIGN,
        **run._asdict(),
        "settings": design.settings_of(run, args.config),
        "batch_size": config.batch_size,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": round(seconds, 1),
        "images_per_second": round(speeds[len(speeds) // 2], 1),
        "flops_per_step": step_flops,
    }
    for key in (key for key in claim_results.TRAINED if key in lines[-1]):
        result[key] = round(sum(line[key] for line in last) / len(last), 6)
    for key in claim_results.MEASURED:
        if f"eval/{key}" in evaluated:
            result[key] = round(evaluated[f"eval/{key}"], 6)
    claim_results.append(args.results, result)


def train_named(args: argparse.Namespace) -> int:
    """Trains the run `args.run` of the plan; makes its data first where that is missing."""
    from grain_jax import train as trainer

    studies = make_plan(claim_results.read(args.results), args)
    run = next(run for run in design.order(studies) if run.name == args.run)
    trainer.keep_freed_memory()
    locks = args.workdir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"data-{run.data}").open("w") as data_lock:
        fcntl.flock(data_lock, fcntl.LOCK_EX)
        claim_data.prepare(run.data, args.data, args.workdir)
    train(run, args)
    return 0


def make_plan(
    results: Mapping[str, Mapping[str, Any]], args: argparse.Namespace
) -> dict[str, list[design.Run]]:
    """The plan of these flags (`design.plan`)."""
    return design.plan(results, steps=args.steps, aviaries=args.data is None, noise=args.noise)


def check_results(results: Mapping[str, Mapping[str, Any]], config: str) -> None:
    """Raises claim_data.ClaimError where a result has other settings than `claim_design`."""
    for name, result in results.items():
        if design.settings_of(claim_results.run_of(result), config) != result["settings"]:
            raise claim_data.ClaimError(
                f"{name}: its result has other settings than benchmarks/claim_design.py; delete its row,"
                " or give another --results"
            )


def run_all(args: argparse.Namespace) -> int:
    """Trains every run that has no result yet, as many at a time as there are jobs."""
    check_results(claim_results.read(args.results), args.config)
    claim_data.prepare("main", args.data, args.workdir)  # on all cores
    logs = epath.Path(args.workdir / "logs")

    def known() -> list[jobs.Job]:
        studies = make_plan(claim_results.read(args.results), args)
        command = (sys.executable, "-m", "benchmarks.claim", "train", *_flags(args))
        return [
            jobs.Job(run.name, (*command, f"--run={run.name}"), logs / f"{run.name}.log")
            for run in design.order(studies)
        ]

    runner = jobs.Runner(
        jobs=known,
        finished=lambda job: job.name in claim_results.read(args.results),
        slots=jobs.slots(args.jobs),
        screen=jobs.Screen("claim: "),
        # Runs that differ in their seed alone share a compiled program.
        environment={
            "JAX_COMPILATION_CACHE_DIR": str(args.workdir.resolve() / "compiled"),
            **os.environ,
        },
    )
    outcome = runner.run()
    if outcome.failed:
        raise claim_data.ClaimError(
            f"{len(outcome.failed)} runs failed: {' '.join(outcome.failed)}; see their logs in {logs}"
        )
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def _flags(args: argparse.Namespace) -> list[str]:
    flags = [f"--workdir={args.workdir}", f"--results={args.results}", f"--config={args.config}"]
    return [
        *flags,
        f"--steps={args.steps}",
        *([f"--data={args.data}"] if args.data else []),
        *(["--noise"] if args.noise else []),
    ]


def main() -> int:
    """Runs one command; returns the exit status."""
    defaults = {}
    parser = argparse.ArgumentParser(
        "python -m benchmarks.claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "report", "train"], metavar="run|report")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of your own data")
    parser.add_argument("--config", default=design.CONFIG, metavar="FILE")
    parser.add_argument("--steps", type=int, default=design.STEPS, help=f"default: {design.STEPS}")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    parser.add_argument(
        "--noise",
        action="store_true",
        help="also degrade the annotations further, on the first seed",
    )
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)  # of the command train
    for flag, ours, own in (
        ("workdir", "runs/claim", "claim"),
        ("results", "benchmarks/results/claim.tsv", "claim/results.tsv"),
        ("pictures", "docs", "claim"),
    ):
        parser.add_argument(
            f"--{flag}", type=pathlib.Path, help=f"default: {ours}; with --data: DIR/{own}"
        )
        defaults[flag] = ours, own
    args = parser.parse_args()
    for flag, (ours, own) in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, args.data / own if args.data else pathlib.Path(ours))
    try:
        if args.command == "run":
            return run_all(args)
        if args.command == "train":
            return train_named(args)
        results = claim_results.read(args.results)
        check_results(results, args.config)
        claim_report.report(make_plan(results, args), results, args.pictures)
        rate = design.best_rate(results, design.OURS, args.steps)
        if rate is not None:
            run = design.Run(design.OURS, rate, design.SEEDS[0], args.steps)
            folder = args.workdir / "runs" / run.name
            if folder.exists():  # the table is in the repository, checkpoints are not
                print(
                    f"## Queries of {claim_report.LABELS[run.arm]} (first seed, unseen test images)\n"
                )
                print(
                    claim_report.query_table(folder, (args.data or args.workdir / "main") / "test")
                )
    except errors.UserError as error:
        print(f"python -m benchmarks.claim: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
