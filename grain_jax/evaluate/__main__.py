"""`python -m grain_jax.evaluate zeroshot|retrieval|grounding --checkpoint DIR ... --output OUT.json`.

Writes the result as JSON and prints it as a table. Wrong usage or input: a line a fault, status 2.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

import grain_jax
from grain_jax import annotations, checkpoint, config, inference
from grain_jax.evaluate import base, grounding, prompts, retrieval, zeroshot
from grain_jax.input_pipeline import tokenizer
from grain_jax.report import tables

COMMANDS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "zeroshot": (zeroshot.evaluate, "classifies a folder with one sub-folder a class"),
    "retrieval": (retrieval.evaluate, "R@1, R@5, R@10 between pictures and captions, both ways"),
    "grounding": (grounding.evaluate, "box IoU, Acc@0.5, region-to-description R@1"),
}
_FAULTS = (
    base.InputError,
    annotations.AnnotationError,
    prompts.PromptError,
    inference.InputError,
    tokenizer.TokenizerError,
    checkpoint.CheckpointError,
    config.ConfigError,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise base.InputError(f"{self.prog}: {message}")


def _alphas(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number from 0 to 1, or several with commas between"
        ) from None


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of pictures, at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="grain_jax.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (_, does) in COMMANDS.items():
        sub = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        sub.add_argument(
            "--checkpoint", required=True, help="training workdir, checkpoint or converted folder"
        )
        sub.add_argument("--images", required=True, help="folder of pictures (or class folders)")
        sub.add_argument("--output", required=True, help="JSON file to write")
        sub.add_argument(
            "--batch-size", type=_batch_size, default=base.BATCH_SIZE, help="pictures at a time"
        )
        if name != "zeroshot":
            sub.add_argument("--annotations", required=True, help="A.jsonl")
            continue
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
        sub.add_argument(
            "--templates", help="text file of prompts, one a line, with {} for the name"
        )
    return parser


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The command's keyword arguments; what can be checked without the model is checked here."""
    options = {"images": args.images, "batch_size": args.batch_size}
    if args.command != "zeroshot":
        read = annotations.read(args.annotations)
        if read.faults:  # few enough to go on without their lines
            left_out = f"{args.annotations}: faulty lines left out: {read.faulty_lines}"
            print(*read.faults, left_out, sep="\n", file=sys.stderr)
        base.picture_folder(args.images)
        return options | {"annotations": args.annotations}
    classes, _, _ = zeroshot.class_folders(args.images)
    if args.descriptions is not None:
        zeroshot.read_descriptions(args.descriptions, classes)
    alphas = list(dict.fromkeys(sum(args.alpha, []))) if args.alpha else None
    names = args.use_names == "yes"
    return options | {
        "descriptions": args.descriptions,
        "alphas": zeroshot.check_alphas(alphas, args.descriptions, names),
        "names": names,
        "region_order": args.region_order,
        "templates": args.templates,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one evaluation; returns the exit status: 0, or 2 with a line a fault on stderr."""
    try:
        args = _parser().parse_args(arguments)
        output = epath.Path(args.output)
        if output.is_dir():
            raise base.InputError(f"--output: {output} is a folder, expected a file to write")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise base.InputError(f"--output: {output}: {error.strerror or error}") from None
        options = _options(args)
        predictor = grain_jax.load(args.checkpoint)
        began = time.monotonic()
        result = COMMANDS[args.command][0](predictor, **options)
        result["seconds"] = round(time.monotonic() - began, 1)
    except _FAULTS as error:
        faults = str(error).split("\n")
        print(*faults, sep="\n", file=sys.stderr)
        if len(faults) > 1 and not isinstance(error, annotations.AnnotationError):  # has its own
            print(f"{len(faults)} faults; nothing was evaluated", file=sys.stderr)
        return 2
    shown = tables.describe({args.command: base.scalars(result)})
    if args.command == "zeroshot":  # scripts that ask for one alpha find its numbers on top
        alpha = options["alphas"][0]
        result |= {
            "alpha": alpha,
            **result[f"alpha_{alpha}"],
            "descriptions_file": args.descriptions,
        }
    result |= {k: getattr(args, k) for k in ("checkpoint", "images", "annotations") if k in args}
    output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(shown)
    for reason in result.get("unreadable_pictures", ()):
        print(f"left out: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
