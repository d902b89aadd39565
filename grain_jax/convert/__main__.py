"""`grain-jax convert KIND --input IN --output OUT` (to-...: --checkpoint DIR): conversion of checkpoints.

Conversions end with a parity report. Exit status: 0; 1 if parity failed or the disk is full; 2: wrong input.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from grain_jax.convert import huggingface, parity
from grain_jax.convert.arguments import Convert
from grain_jax.convert.average import average
from grain_jax.convert.big_vision import from_big_vision, to_big_vision
from grain_jax.convert.exits.onnx_files import to_onnx
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.convert.open_clip import from_open_clip, to_open_clip
from grain_jax.convert.pack import pack
from grain_jax.convert.reference import commands as reference
from grain_jax.convert.reference.names import TOWERS
from grain_jax.core import errors

COMMANDS: dict[str, Callable[[argparse.Namespace], parity.Report]] = {
    "from-torch": lambda args: reference.from_torch(
        args.input, args.output, {tower: getattr(args, f"{tower}_heads") for tower in TOWERS}
    ),
    "to-torch": lambda args: reference.to_torch(args.input, args.output),
    "to-hf": lambda args: huggingface.to_hf(args.input, args.output, args.part),
    "to-open-clip": lambda args: to_open_clip(args.input, args.output),
    "to-big-vision": lambda args: to_big_vision(args.input, args.output),
    "to-onnx": lambda args: to_onnx(args.input, args.output),
    "from-hf": lambda args: from_hf(args.input, args.output),
    "from-open-clip": lambda args: from_open_clip(args.input, args.output, args.model),
    "from-big-vision": lambda args: from_big_vision(args.input, args.output),
    "pack": lambda args: pack(args.input, args.output),
    "average": lambda args: average(args.model, args.weights, args.output),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one conversion and returns the exit status; prints faults on stderr, one line each."""
    try:
        args = Convert.parse(arguments)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    try:
        with errors.out_of_memory_in_a_line(args.command):
            report = COMMANDS[args.command](args)
    except parity.ParityError as error:
        print(error, file=sys.stderr)
        print("parity: FAILED: the two sides cannot be compared", file=sys.stderr)
        return 1
    except errors.UserError as error:
        faults = str(error).split("\n")
        print(*faults, sep="\n", file=sys.stderr)
        if not isinstance(error, errors.StorageFault):
            ending = f"fault{'s' * (len(faults) > 1)}; nothing was written"
            print(len(faults), ending, file=sys.stderr)
        return error.status
    print(report.text)
    if not report.ok:
        print(f"{args.output}: was written, but its outputs differ; see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
