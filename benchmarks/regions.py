"""What box heads and hard negatives bring, and what they cost the rest, on the aviary: three seeds, equal steps.

    python -m benchmarks.regions run     trains every run that has no row in the table of results; may be stopped at
                                         any time and started again
    python -m benchmarks.regions report  prints the tables (Markdown)

All arms are the recipe that won in docs/claim.md with other keys of `model.boxes` and of the losses; data, towers,
batch, schedule and learning rate are the same.
"""

import argparse
import csv
import json
import os
import pathlib
import runpy
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath
from grain_jax.launch import jobs

from benchmarks import claim_design
from grain_jax import errors, recipe

SEEDS = (0, 1, 2)
STEPS = 500
RATE = 1e-3
NEGATIVES = 10  # of a region; a step sees 3 of them
AVIARY = {**claim_design.AVIARY, "seed": 29, "negatives": NEGATIVES}

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
    "near_region": "near_misses/region/top1",
    "near_head": "near_misses/box_head/top1",
    "pointing": "maps/pointing",
    "map_iou": "maps/map_iou",
}
COLUMNS = (
    "arm",
    "seed",
    "steps",
    "device",
    "jax",
    "images_per_second",
    "flops_per_step",
    *MEASURES,
)


def make_config(arm: str, seed: int, data: pathlib.Path, steps: int) -> Any:
    """The config of a run, with its evaluations."""
    c = runpy.run_path(claim_design.CONFIG)["get_config"]()
    run = claim_design.Run(claim_design.OURS, RATE, seed, steps)
    c.update_from_flattened_dict({**claim_design.changes(run, claim_design.CONFIG), **ARMS[arm]})
    c.total_epochs = c.input.prepare = c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(data / "records"), "regions"
    images = data / "aviary"
    described = dict(names=False, descriptions=str(images / "unseen.json"))
    test = dict(images=str(images / "test"), annotations=str(images / "test" / "A.jsonl"))
    evaluator = recipe.evaluator
    c.evals = recipe.ConfigDict(
        {
            "seen": evaluator("zeroshot", str(images / "seen"), alphas=(1.0,)),
            "unseen": evaluator("zeroshot", str(images / "unseen"), alphas=(0.5,), **described),
            "unit": evaluator(
                "zeroshot", str(images / "unseen"), alphas=(1.0,), unit_features=True, **described
            ),
            "retrieval": evaluator("retrieval", **test),
            "grounding": evaluator("grounding", **test),
            "boxes": evaluator("boxes", templates=str(data / "templates.txt"), **test),
            "near_misses": evaluator("near_misses", negatives=NEGATIVES, **test),
            "maps": evaluator("maps", **test),
        }
    )
    return c


def train(name: str, args: argparse.Namespace) -> None:
    """Trains and evaluates the run ARM-SEED and appends its row."""
    import jax

    from grain_jax import config as config_lib
    from grain_jax import train as trainer
    from grain_jax.models.grain import GRAIN
    from grain_jax.runtime import checkpoint, metrics_file
    from grain_jax.training import flops, optim, sharding, train_step

    arm, _, seed = name.rpartition("-")
    trainer.keep_freed_memory()
    config = config_lib.from_dict(make_config(arm, int(seed), args.workdir, args.steps))
    workdir = args.workdir / "runs" / name
    trainer.train(config, epath.Path(workdir))
    config, _ = checkpoint.newest_config(workdir)  # with the numbers that it left open
    assert config is not None
    lines = [line.values for line in metrics_file.read([workdir / metrics_file.FILE])[0]]
    model = GRAIN(config.model, config.dtype, config.remat)
    tx = optim.optimizer(config.optim, lambda step: 0.0)
    state = jax.eval_shape(lambda: sharding.unbox(train_step.init_state(model, config, tx)))
    step_flops = flops.matmul_flops(
        lambda p, b: train_step.loss_and_grads(model, config, None, p, b, None),
        state.params,
        train_step.abstract_batch(config),
    )
    measured = json.loads((workdir / "results.json").read_text())
    row = {
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "images_per_second": round(statistics.median(x["images_per_second"] for x in lines), 1),
        "flops_per_step": step_flops,
    }
    for column, key in MEASURES.items():
        row[column] = round(measured[f"eval/{key}"], 6) if f"eval/{key}" in measured else ""
    new = not args.results.exists()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: pathlib.Path) -> dict[str, Mapping[str, str]]:
    """ARM-SEED -> row of every finished run."""
    if not path.exists():
        return {}
    with path.open() as file:
        return {f"{row['arm']}-{row['seed']}": row for row in csv.DictReader(file, delimiter="\t")}


def run_all(args: argparse.Namespace) -> int:
    """Draws the data and trains every run without a row, as many at a time as there are jobs."""
    from grain_jax.data.aviary import __main__ as draw

    flags = [f"--{key.replace('_', '-')}={value}" for key, value in AVIARY.items()]
    output = [f"--output={args.workdir / 'aviary'}", f"--records={args.workdir / 'records'}"]
    if draw.main([*output, "--name=regions", *flags]):
        raise errors.UserError(f"{args.workdir}: the aviary could not be drawn")
    (args.workdir / "templates.txt").write_text("{}\n")
    names = [f"{arm}-{seed}" for seed in SEEDS for arm in ARMS]
    logs = epath.Path(args.workdir / "logs")
    command = (sys.executable, "-m", "benchmarks.regions", "train", *_flags(args))
    outcome = jobs.Runner(
        jobs=lambda: [
            jobs.Job(name, (*command, f"--run={name}"), logs / f"{name}.log") for name in names
        ],
        finished=lambda job: job.name in read(args.results),
        slots=jobs.slots(args.jobs),
        screen=jobs.Screen("regions: "),
        environment={
            "JAX_COMPILATION_CACHE_DIR": str(args.workdir.resolve() / "compiled"),
            **os.environ,
        },
    ).run()
    if outcome.failed:
        raise errors.UserError(f"failed: {' '.join(outcome.failed)}; see their logs in {logs}")
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def _flags(args: argparse.Namespace) -> list[str]:
    return [f"--workdir={args.workdir}", f"--results={args.results}", f"--steps={args.steps}"]


def report(results: Mapping[str, Mapping[str, str]]) -> None:
    """Prints the measures of each arm, mean and standard deviation over its seeds, and each seed's."""
    print("| measure | " + " | ".join(ARMS) + " |\n| --- |" + " ---: |" * len(ARMS))
    for column in ("flops_per_step", *MEASURES):
        cells = []
        for arm in ARMS:
            rows = [results[name] for seed in SEEDS if (name := f"{arm}-{seed}") in results]
            values = [float(row[column]) for row in rows if row[column]]
            if column == "flops_per_step":
                cells.append(f"{values[0] / 1e9:.1f} GF" if values else "")
                continue
            scale, digits = (1, 3) if column in ("iou", "map_iou") else (100, 1)
            each = ", ".join(f"{scale * x:.{digits}f}" for x in values)
            mean = f"{scale * statistics.fmean(values):.{digits}f}" if values else "-"
            deviation = (
                f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            )
            cells.append(f"{mean}{deviation} ({each})" if len(values) > 1 else mean)
        print(f"| {column} | " + " | ".join(cells) + " |")


def main() -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.regions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "report", "train"], metavar="run|report")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/regions"))
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "regions.tsv",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)  # of the command train
    args = parser.parse_args()
    try:
        if args.command == "run":
            return run_all(args)
        if args.command == "train":
            train(args.run, args)
        else:
            report(read(args.results))
    except errors.UserError as error:
        print(f"python -m benchmarks.regions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
