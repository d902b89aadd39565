"""`python -m grain_jax.convert COMMAND --input IN --output OUT`: checkpoints between frameworks.

Every conversion ends with a parity report. Exit status: 0; 1 where parity failed; 2 for wrong input.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from grain_jax import config as config_lib
from grain_jax import errors
from grain_jax.convert import big_vision, huggingface, open_clip, parity, towers
from grain_jax.convert import torch as reference

TOWERS = ("image", "text", "decoder")


class Command(NamedTuple):
    """One conversion."""

    does: str
    run: Callable[[argparse.Namespace], parity.Report]


def _from_torch(args) -> parity.Report:
    heads = {tower: getattr(args, f"{tower}_heads") for tower in TOWERS}
    return reference.convert(args.input, args.output, heads)


def _settings(args) -> towers.Settings:
    return towers.Settings(
        heads={tower: getattr(args, f"{tower}_heads") for tower in towers.TOWERS},
        activation={tower: getattr(args, f"{tower}_activation") for tower in towers.TOWERS},
    )


COMMANDS = {
    "from-torch": Command(
        "the PyTorch reference's .pth.tar -> a folder that grain_jax.load reads", _from_torch
    ),
    "to-torch": Command(
        "a workdir, checkpoint or folder -> the PyTorch reference's .pth.tar",
        lambda args: reference.convert_back(args.input, args.output),
    ),
    "to-hf": Command(
        "a workdir, checkpoint or folder -> a folder for transformers' AutoModel",
        lambda args: huggingface.to_hf(args.input, args.output),
    ),
    "from-hf": Command(
        "a folder of to-hf -> a folder that grain_jax.load reads",
        lambda args: huggingface.from_hf(args.input, args.output),
    ),
    "from-open-clip": Command(
        "CLIP's or SigLIP's weights (OpenAI, open_clip, Hugging Face) -> a folder of ours, two towers",
        lambda args: open_clip.convert(args.input, args.output, _settings(args)),
    ),
    "from-big-vision": Command(
        "a two_towers .npz of big_vision (FILE.npz:sub-tree) -> a folder of ours, two towers",
        lambda args: big_vision.convert(args.input, args.output, _settings(args)),
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise reference.ConvertError(f"{self.prog}: {message}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    known = "\n".join(f"  {name}: {command.does}" for name, command in COMMANDS.items())
    parser = _Parser(
        prog="grain_jax.convert",
        description=f"Commands:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=", ".join(COMMANDS))
    parser.add_argument("--input", required=True, help="what to read")
    parser.add_argument(
        "--output", required=True, help="what to write: new, or an older conversion"
    )
    for tower in TOWERS:
        parser.add_argument(
            f"--{tower}-heads",
            type=int,
            help=f"attention heads of the {tower} tower; a state dict does not hold them",
        )
    for tower in towers.TOWERS:
        parser.add_argument(
            f"--{tower}-activation",
            choices=config_lib.ACTIVATIONS,
            help=f"of the {tower} tower of from-open-clip, where no file beside the weights tells",
        )
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"no such command: {arguments[0]!r}; there are: {', '.join(COMMANDS)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one conversion; returns the exit status, the faults on stderr, a line each."""
    try:
        args = _parse(sys.argv[1:] if arguments is None else arguments)
        with errors.out_of_memory_in_a_line(args.command):
            report = COMMANDS[args.command].run(args)
    except parity.ParityError as error:
        print(error, file=sys.stderr)
        print("parity: FAILED: the two sides cannot be compared", file=sys.stderr)
        return 1
    except errors.UserError as error:
        faults = str(error).split("\n")
        print(*faults, sep="\n", file=sys.stderr)
        print(f"{len(faults)} fault{'s' * (len(faults) > 1)}; nothing was written", file=sys.stderr)
        return 2
    print(report.text)
    if not report.ok:
        print(f"{args.output}: was written, but gives other outputs; see above", file=sys.stderr)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
