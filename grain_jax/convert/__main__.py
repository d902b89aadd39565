"""`python -m grain_jax.convert COMMAND --input IN --output OUT`: checkpoints between frameworks."""

import argparse
import sys
from collections.abc import Sequence

from grain_jax.convert import torch as from_torch

COMMANDS = {"from-torch": "the PyTorch reference's .pth.tar -> a folder that grain_jax.load reads"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise from_torch.ConvertError(f"{self.prog}: {message}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    known = "\n".join(f"  {name}: {does}" for name, does in COMMANDS.items())
    parser = _Parser(
        prog="grain_jax.convert",
        description=f"Commands:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=", ".join(COMMANDS))
    parser.add_argument("--input", required=True, help="the checkpoint file to read")
    parser.add_argument(
        "--output", required=True, help="the folder to write, new or an older conversion"
    )
    for tower in ("image", "text", "decoder"):
        parser.add_argument(
            f"--{tower}-heads",
            type=int,
            help=f"attention heads of the {tower} tower; a state dict does not hold them",
        )
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"no such command: {arguments[0]!r}; there are: {', '.join(COMMANDS)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one conversion; returns the exit status: 0, or 2 with a line a fault on stderr."""
    try:
        args = _parse(sys.argv[1:] if arguments is None else arguments)
        heads = {t: getattr(args, f"{t}_heads") for t in ("image", "text", "decoder")}
        print(from_torch.convert(args.input, args.output, heads))
    except from_torch.ConvertError as error:
        faults = str(error).split("\n")
        print(*faults, sep="\n", file=sys.stderr)
        print(f"{len(faults)} fault{'s' * (len(faults) > 1)}; nothing was written", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
