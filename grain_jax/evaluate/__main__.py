"""`python -m grain_jax.evaluate zeroshot|retrieval|grounding --checkpoint DIR ... --output OUT.json`.

Prints the result as a table and writes it as JSON. Wrong usage or input: a line a fault, status 2.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from etils import epath

import grain_jax
from grain_jax import annotations, config, errors
from grain_jax.evaluate import base, zeroshot
from grain_jax.report import tables

COMMANDS = {
    "zeroshot": "classifies a folder with one sub-folder a class",
    "retrieval": "R@1, R@5, R@10 between pictures and captions, both ways",
    "grounding": "box IoU, Acc@0.5, region-to-description R@1",
}


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
    for name, does in COMMANDS.items():
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


def _entry(args: argparse.Namespace) -> config.Evaluator:
    """The command as an entry of `config.evals`."""
    common = dict(kind=args.command, images=args.images)
    if args.command != "zeroshot":
        unused = dict(descriptions=None, alphas=(), names=True, region_order="queries")
        return config.Evaluator(**common, **unused, annotations=args.annotations)
    alphas = list(dict.fromkeys(sum(args.alpha, []))) if args.alpha else None
    names = args.use_names == "yes"
    return config.Evaluator(
        **common,
        descriptions=args.descriptions,
        annotations=None,
        alphas=tuple(zeroshot.check_alphas(alphas, args.descriptions, names)),
        names=names,
        region_order=args.region_order,
    )


def _output(path: str) -> epath.Path:
    output = epath.Path(path)
    if output.is_dir():
        raise base.InputError(f"--output: {output} is a folder, expected a file to write")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise base.InputError(f"--output: {output}: {error.strerror or error}") from None
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one evaluation; returns the exit status: 0, or 2 with a line a fault on stderr."""
    try:
        args = _parser().parse_args(arguments)
        output, entry = _output(args.output), _entry(args)
        options = {"templates": args.templates} if args.command == "zeroshot" else {}
        base.check(entry, **options)  # before the checkpoint is read
        predictor = grain_jax.load(args.checkpoint)
        began = time.monotonic()
        result = base.evaluate(entry, predictor, batch_size=args.batch_size, **options)
        result["seconds"] = round(time.monotonic() - began, 1)
    except errors.UserError as error:
        faults = str(error).split("\n")
        print(*faults, sep="\n", file=sys.stderr)
        own_summary = isinstance(error.__cause__, annotations.AnnotationError)
        if len(faults) > 1 and not own_summary:
            print(f"{len(faults)} faults; nothing was evaluated", file=sys.stderr)
        return 2
    print(tables.describe({args.command: base.scalars(result)}), flush=True)
    for reason in result.get("unreadable_pictures", ()):
        print(f"left out: {reason}", file=sys.stderr)
    if args.command == "zeroshot":  # scripts that ask for one alpha find its numbers on top
        alpha = entry.alphas[0]
        result |= {
            "alpha": alpha,
            **result[f"alpha_{alpha}"],
            "descriptions_file": args.descriptions,
        }
    result |= {k: getattr(args, k) for k in ("checkpoint", "images", "annotations") if k in args}
    try:
        output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:  # the numbers are on the screen at least
        print(f"--output: {output}: {error.strerror or error}; nothing was saved", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
