"""`python -m grain_jax.convert COMMAND --input IN --output OUT`: conversion of checkpoints.

Every conversion ends with a parity report. Exit status: 0; 1 if parity failed; 2 for wrong input.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from grain_jax import config as config_lib
from grain_jax import errors
from grain_jax.convert import huggingface, parity, towers
from grain_jax.convert.big_vision.command import from_big_vision
from grain_jax.convert.open_clip.command import from_open_clip
from grain_jax.convert.pack import pack
from grain_jax.convert.reference import commands as reference
from grain_jax.convert.reference.sizes import TOWERS
from grain_jax.pretrained import hub
from grain_jax.runtime.arguments import Parser


class Command(NamedTuple):
    """One conversion."""

    about: str
    run: Callable[[argparse.Namespace], parity.Report]


def _settings(args) -> towers.Settings:
    return towers.Settings(
        heads={tower: getattr(args, f"{tower}_heads") for tower in towers.TOWERS},
        activation={tower: getattr(args, f"{tower}_activation") for tower in towers.TOWERS},
    )


COMMANDS = {
    "from-torch": Command(
        "the PyTorch reference's .pth.tar -> a folder for grain_jax.load",
        lambda args: reference.from_torch(
            args.input,
            args.output,
            {tower: getattr(args, f"{tower}_heads") for tower in TOWERS},
        ),
    ),
    "to-torch": Command(
        "a workdir, checkpoint or folder -> the PyTorch reference's .pth.tar",
        lambda args: reference.to_torch(args.input, args.output),
    ),
    "to-hf": Command(
        "a workdir, checkpoint or folder -> a folder for transformers' AutoModel",
        lambda args: huggingface.to_hf(args.input, args.output, args.push),
    ),
    "from-hf": Command(
        "a folder of to-hf, or hf://ORG/NAME -> a folder for grain_jax.load",
        lambda args: huggingface.from_hf(args.input, args.output),
    ),
    "from-open-clip": Command(
        "CLIP or SigLIP weights (OpenAI, open_clip, Hugging Face) -> a two-tower model for grain_jax.load",
        lambda args: from_open_clip(args.input, args.output, _settings(args)),
    ),
    "from-big-vision": Command(
        "a two_towers .npz of big_vision (FILE.npz:sub-tree) -> a two-tower model for grain_jax.load",
        lambda args: from_big_vision(args.input, args.output, _settings(args)),
    ),
    "pack": Command(
        "a workdir, checkpoint or folder -> a small folder for grain_jax.load, in bfloat16",
        lambda args: pack(args.input, args.output),
    ),
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    known = "\n".join(f"  {name}: {command.about}" for name, command in COMMANDS.items())
    parser = Parser(prog="grain_jax.convert", description=f"Commands:\n{known}")
    parser.add_argument("command", help=", ".join(COMMANDS))
    parser.add_argument("--input", required=True, help="the checkpoint to read")
    parser.add_argument(
        "--output",
        required=True,
        help="where to write: a new folder or file, or an older conversion",
    )
    for tower in TOWERS:
        parser.add_argument(
            f"--{tower}-heads",
            type=int,
            help=f"attention heads of the {tower} tower, where the checkpoint does not state them",
        )
    for tower in towers.TOWERS:
        parser.add_argument(
            f"--{tower}-activation",
            choices=config_lib.ACTIVATIONS,
            help=f"of the {tower} tower, where the checkpoint does not state it (from-open-clip)",
        )
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="to-hf: upload the folder to this repository of the Hugging Face Hub, which is made if it is not there",
    )
    parser.add_argument(
        "--private", action="store_true", help="--push: a new repository is a private one"
    )
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"no such command: {arguments[0]!r}; there are: {', '.join(COMMANDS)}")
    args = parser.parse_args(arguments)
    if args.push and args.command != "to-hf":
        parser.error(f"--push: got the command {args.command}, expected to-hf")
    if args.private and not args.push:
        parser.error("--private: expected --push ORG/NAME with it")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one conversion and returns the exit status; prints faults on stderr, a line each."""
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
        print(f"{args.output}: was written, but its outputs differ; see above", file=sys.stderr)
        return 1
    if args.push:
        try:
            print("pushed to", huggingface.push(args.output, args.push, args.private))
        except hub.HubError as error:
            print(f"{error}\n{args.output}: was written, not pushed", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
