"""`python -m grain_jax.evaluate zeroshot|linear-probe|retrieval|grounding|suite --checkpoint DIR ... --output OUT.json`.

Prints the result as a table and writes it as JSON. Wrong usage or input: a line a fault, status 2. Several
processes (launch.local, SLURM, TPU slices) share the images; the first one prints and writes.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from grain_jax import config, errors, inference
from grain_jax.config.evals import Context
from grain_jax.evaluate import encode, evaluators, suite, tables, zeroshot
from grain_jax.evaluate.test_sets import InputError
from grain_jax.files import annotations, atomic
from grain_jax.inference import text_cache
from grain_jax.runtime import command_line, distributed, processes
from grain_jax.runtime.arguments import Parser

COMMANDS = {
    "zeroshot": "classifies a folder with one sub-folder a class",
    "linear-probe": "classifies by a logistic regression on image embeddings, also of few shots",
    "retrieval": "R@1, R@5, R@10 between images and captions, both ways",
    "grounding": "box IoU, Acc@0.5, region-to-description R@1",
    "suite": "all entries of a config such as configs/eval.py; --config.a.b=value changes it",
}
_HEARTBEAT_SECONDS = 20


def _alphas(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number from 0 to 1, or several with commas between"
        ) from None


def _shots(text: str) -> list[int]:
    parts = ["0" if part == "all" else part for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected images a class, or all, or several with commas between (1,5,all)"
        )
    return list(map(int, parts))


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of images, at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="grain_jax.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, does in COMMANDS.items():
        sub = commands.add_parser(name, help=does, description=does)
        sub.add_argument(
            "--checkpoint", required=True, help="training workdir, checkpoint or converted folder"
        )
        if name != "suite":
            sub.add_argument("--images", required=True, help="folder of images (or class folders)")
        sub.add_argument("--output", required=True, help="JSON file to write")
        sub.add_argument(
            "--batch-size", type=_batch_size, default=encode.BATCH_SIZE, help="images at a time"
        )
        sub.add_argument(
            "--cache",
            default=text_cache.DEFAULT,
            help='folder of text embeddings, default %(default)s; "": none',
        )
        sub.add_argument("--coordinator", help="HOST:PORT of the first of several processes")
        sub.add_argument("--processes", type=int, default=1, help="how many processes there are")
        sub.add_argument("--process_id", type=int, default=0, help="which of them this is, from 0")
        if name == "suite":
            sub.add_argument("--only", help="names of entries, with commas between")
            sub.add_argument(
                "--again", action="store_true", help="measures what OUT.json has already, too"
            )
        if name in ("retrieval", "grounding"):
            sub.add_argument("--annotations", required=True, help="A.jsonl")
        if name == "zeroshot":
            _add_zeroshot(sub)
        if name == "linear-probe":
            sub.add_argument(
                "--train",
                help="class folders to train on; default: a share of each class of --images",
            )
            sub.add_argument(
                "--shots",
                type=_shots,
                default=[0],
                help="training images a class, a probe each: 1,5,all; default all",
            )
            sub.add_argument(
                "--seeds", type=int, default=5, help="draws of few shots, default %(default)s"
            )
    return parser


def _add_zeroshot(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--descriptions", help="D.json: {class name: [description, ...]}")
    sub.add_argument(
        "--alpha",
        type=_alphas,
        action="append",
        help="share of the global score, also several (0.5,1); default 1, with descriptions 1,0.5",
    )
    sub.add_argument(
        "--use-names",
        choices=("yes", "no"),
        default="yes",
        help="no: a class is its descriptions alone (for names that mean nothing)",
    )
    sub.add_argument(
        "--region-order",
        choices=zeroshot.REGION_ORDERS,
        default="queries",
        help="what the region score is averaged over; queries: the paper's",
    )
    sub.add_argument("--templates", help="text file of prompts, one a line, with {} for the name")
    sub.add_argument("--predictions", help="file to write: a line of JSON per image")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; of `suite` also its config, as `suite`."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if args.command == "suite":
        values = flags.FlagValues()
        argv = ["evaluate", *rest]
        holder = config_flags.DEFINE_config_file(
            "config", None, "config file, e.g. configs/eval.py", values, sys_argv=argv
        )
        args.suite = command_line.parse_config(argv, holder, values, config.suite_from_dict)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _entry(args: argparse.Namespace) -> config.Evaluator:
    """The entry of `config.evals` that the command is."""
    if args.command == "linear-probe":
        if args.seeds < 1:
            raise InputError(f"--seeds: got {args.seeds}, expected at least 1")
        return evaluators.LinearProbe(
            images=args.images, train=args.train, shots=tuple(args.shots), seeds=args.seeds
        )
    if args.command == "zeroshot":
        alphas = list(dict.fromkeys(sum(args.alpha, []))) if args.alpha else None
        names = args.use_names == "yes"
        return evaluators.ZeroShot(
            images=args.images,
            descriptions=args.descriptions,
            alphas=tuple(zeroshot.check_alphas(alphas, args.descriptions, names)),
            names=names,
            region_order=args.region_order,
            templates=args.templates,
        )
    of_command = {"retrieval": evaluators.Retrieval, "grounding": evaluators.Grounding}
    return of_command[args.command](images=args.images, annotations=args.annotations)


def _output(path: str, name: str = "--output") -> epath.Path:
    output = epath.Path(path)
    if output.is_dir():
        raise InputError(f"{name}: {output} is a folder, expected a file to write")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: {output}: {error.strerror or error}") from None
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one evaluation, or a suite; returns the exit status: 0, or 2 with a line a fault on stderr.

    Of a suite, 1 where one of its entries failed, and 2 where there was nothing that could be run.
    """
    try:
        args = _parse(arguments)
        distributed.initialize(
            args.coordinator, args.processes, args.process_id, _HEARTBEAT_SECONDS
        )
        together = contextlib.nullcontext()
        if jax.distributed.is_initialized():
            together = distributed.ending_together(_HEARTBEAT_SECONDS)
        with together, errors.out_of_memory_in_a_line("evaluation", lambda: encode.SMALLER):
            return _suite(args) if args.command == "suite" else _one(args)
    except errors.UserError as error:
        if processes.process_info()[0] == 0:
            _say_faults(error)
        return errors.UserError.status


def _say_faults(error: errors.UserError) -> None:
    faults = str(error).split("\n")
    print(*faults, sep="\n", file=sys.stderr)
    own_summary = isinstance(error.__cause__, annotations.AnnotationError)
    if len(faults) > 1 and not own_summary:
        print(f"{len(faults)} faults; nothing was evaluated", file=sys.stderr)


def _load(args: argparse.Namespace):
    predictor = inference.load(args.checkpoint)
    return text_cache.CachedTexts(predictor, args.cache) if args.cache else predictor


def _suite(args: argparse.Namespace) -> int:
    output = processes.run_together(lambda: _output(args.output))
    return suite.run(
        args.suite,
        output,
        checkpoint=args.checkpoint,
        load=lambda: _load(args),
        only=None if args.only is None else args.only.split(","),
        again=args.again,
        batch_size=args.batch_size,
    )


def _one(args: argparse.Namespace) -> int:
    options = {}
    if getattr(args, "predictions", None):
        options["predictions"] = processes.run_together(
            lambda: _output(args.predictions, "--predictions")
        )
    output, entry = processes.run_together(lambda: (_output(args.output), _entry(args)))
    processes.run_together(entry.check)  # before the checkpoint is read
    predictor = processes.run_together(lambda: _load(args))
    began = time.monotonic()
    result = entry.evaluate(predictor, Context(args.batch_size), **options)
    result["seconds"] = round(time.monotonic() - began, 1)
    if processes.process_info()[0]:
        return 0
    print(tables.describe({args.command: tables.scalars(result)}), flush=True)
    for reason in result.get("unreadable_pictures", ()):
        print(f"left out: {reason}", file=sys.stderr)
    if isinstance(entry, evaluators.ZeroShot):  # the numbers of the first alpha, on top
        alpha = entry.alphas[0]
        result |= {
            "alpha": alpha,
            **result[f"alpha_{alpha}"],
            "descriptions_file": args.descriptions,
        }
    result |= {
        k: getattr(args, k) for k in ("checkpoint", "images", "train", "annotations") if k in args
    }
    try:
        atomic.write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:  # the numbers have been printed
        print(f"--output: {output}: {error.strerror or error}; nothing was saved", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
