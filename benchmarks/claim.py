"""The claim, tested: does aligning regions with descriptions beat CLIP at equal data and compute?

    python -m benchmarks.claim run     trains whatever has no result file yet; stop it and start it again at will
    python -m benchmarks.claim report  prints the tables (Markdown) and draws the images

Every arm has the same towers, images, batch, schedule and grid of learning rates; an arm differs by the few
keys in `ARMS`. Half of the classes that training never shows are for validation (they choose the learning
rate), the other half is reported. docs/claim.md says what was fixed before the first run, and what came out.

On data of your own: --data DIR, a folder with
    A.jsonl                           training annotations (data/SCHEMA.md), images below DIR
    seen/CLASS/*, unseen/CLASS/*      images of classes whose names captions know, and of classes that they do not
    unseen.json                       {"class": ["description", ...]} of the unseen ones
    test/A.jsonl, test/seen.jsonl, test/unseen.jsonl   annotations below DIR/test, for retrieval and grounding
and --config FILE for a larger model (default: configs/demo.py).
"""

import argparse
import fcntl
import json
import os
import pathlib
import platform
import runpy
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from benchmarks import claim_data, claim_report
from benchmarks import claim_design as design
from grain_jax import errors, recipe
from launch import jobs


def read_results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Name -> result of every run that is done."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def make_config(run: design.Run, file: str, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The run's config: the file's, with the run's changes, on the data set in `main`."""
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
    sentence = described | dict(descriptions=str(views / "sentences.json"), alphas=(1.0,))
    described["alphas"] = design.ALPHAS if regions else (1.0,)
    evals = {}
    for split in ("validation", "test"):
        unseen = str(views / f"unseen_{split}")
        evals[f"seen_{split}"] = recipe.evaluator(
            "zeroshot", str(views / f"seen_{split}"), alphas=(1.0,)
        )
        evals[f"unseen_{split}"] = recipe.evaluator("zeroshot", unseen, **described)
        evals[f"sentence_{split}"] = recipe.evaluator("zeroshot", unseen, **sentence)
    evals["retrieval"] = recipe.evaluator("retrieval", test, annotations=f"{test}/A.jsonl")
    if regions:
        evals["other_order"] = recipe.evaluator(
            "zeroshot", unseen, region_order="descriptions", **described
        )
        for group in ("seen", "unseen"):
            evals[f"grounding_{group}"] = recipe.evaluator(
                "grounding", test, annotations=f"{test}/{group}.jsonl"
            )
    c.evals = recipe.ConfigDict(evals)
    return c


def train(run: design.Run, args: argparse.Namespace) -> None:
    """Trains and evaluates one run, in this process, and writes its result file."""
    import jax

    from grain_jax import config as config_lib
    from grain_jax import train as trainer
    from grain_jax.models.grain import GRAIN
    from grain_jax.training import flops, optim, sharding, train_step

    main = args.data or args.workdir / ("main" if run.data in design.NOISE else run.data)
    config = config_lib.from_dict(make_config(run, args.config, main, args.workdir))
    workdir = args.workdir / "runs" / run.name
    began = time.monotonic()
    trainer.train(config, epath.Path(workdir))
    seconds = time.monotonic() - began

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
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
        **run._asdict(),
        "settings": design.settings_of(run, args.config),
        "batch_size": config.batch_size,
        "seconds": round(seconds, 1),
        "images_per_second": round(speeds[len(speeds) // 2], 1),
        "flops_per_step": step_flops,
        "device": jax.devices()[0].device_kind,
        "host": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "train": {
            key: sum(line[key] for line in last) / len(last)
            for key in (
                "loss_image_caption",
                "loss_region_description",
                "loss_box",
                "matched_iou",
                "logit_scale",
            )
        },
        "texts_dropped": last[-1]["texts_dropped"],
        "eval": {
            key.removeprefix("eval/"): round(value, 6)
            for key, value in evaluated.items()
            if "per_class" not in key
        },
    }
    path = args.results / f"{run.name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(path)


def train_named(args: argparse.Namespace) -> int:
    """Trains the run `args.run` of the plan, on data that is made first where it is not there."""
    from grain_jax import train as trainer

    studies = design.plan(read_results(args.results), steps=args.steps, aviaries=args.data is None)
    run = next(run for run in design.order(studies) if run.name == args.run)
    trainer.keep_freed_memory()
    locks = args.workdir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"data-{run.data}").open("w") as data_lock:
        fcntl.flock(data_lock, fcntl.LOCK_EX)
        claim_data.prepare(run.data, args.data, args.workdir)
    train(run, args)
    return 0


def check_results(results: Mapping[str, Mapping[str, Any]], config: str) -> None:
    """Raises claim_data.ClaimError if a result was made with other settings than this file's."""
    for name, result in results.items():
        run = design.Run(*(result[field] for field in design.Run._fields))
        if design.settings_of(run, config) != result["settings"]:
            raise claim_data.ClaimError(
                f"{name}.json: made with other settings than benchmarks/claim.py has now; move it"
                " away, or give another --results"
            )


def run_all(args: argparse.Namespace) -> int:
    """Trains whatever has no result file yet, as many runs at a time as there are jobs."""
    args.results.mkdir(parents=True, exist_ok=True)
    check_results(read_results(args.results), args.config)
    claim_data.prepare("main", args.data, args.workdir)  # by all cores
    logs = epath.Path(args.workdir / "logs")

    def known() -> list[jobs.Job]:
        results = read_results(args.results)
        studies = design.plan(results, steps=args.steps, aviaries=args.data is None)
        command = (sys.executable, "-m", "benchmarks.claim", "train", *_flags(args))
        return [
            jobs.Job(run.name, (*command, f"--run={run.name}"), logs / f"{run.name}.log")
            for run in design.order(studies)
        ]

    runner = jobs.Runner(
        jobs=known,
        finished=lambda job: (args.results / f"{job.name}.json").exists(),
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
    return [*flags, f"--steps={args.steps}", *([f"--data={args.data}"] if args.data else [])]


def main() -> int:
    """Parses the command line."""
    defaults = {}
    parser = argparse.ArgumentParser(
        "python -m benchmarks.claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "report", "train"], metavar="run|report")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="your own data")
    parser.add_argument("--config", default=design.CONFIG, metavar="FILE")
    parser.add_argument("--steps", type=int, default=design.STEPS, help=f"default: {design.STEPS}")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)  # of the command train
    for flag, ours, own in (
        ("workdir", "runs/claim", "claim"),
        ("results", "benchmarks/results/claim", "claim/results"),
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
        results = read_results(args.results)
        check_results(results, args.config)
        studies = design.plan(results, steps=args.steps, aviaries=args.data is None)
        claim_report.report(studies, results, args.pictures)
        grain = design.best_rate(results, "grain", args.steps)
        if grain is not None:
            run = design.Run("grain", grain, design.SEEDS[0], args.steps)
            folder = args.workdir / "runs" / run.name
            if folder.exists():  # results travel, checkpoints do not
                print("## Queries of GRAIN (first seed, unseen test images)\n")
                print(
                    claim_report.query_table(folder, (args.data or args.workdir / "main") / "test")
                )
    except errors.UserError as error:
        print(f"python -m benchmarks.claim: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
