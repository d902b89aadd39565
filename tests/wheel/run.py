"""The wheel alone, in a fresh environment and in an empty folder: python -m tests.wheel.run [--keep FOLDER]

Builds the wheel, installs it without extras (so without TensorFlow and PyTorch) at the versions of
constraints.txt, and goes through what a base installation promises: train from a config file that lies
anywhere, resume, load, classify, evaluate, export and read back, report, verify; what needs an extra must
say which. Prints a line a step; ends with status 1 and the output of the step that failed. Needs PyPI or
pip's cache. The environment and the folder are removed at the end unless --keep names them.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

from tests.wheel import fresh

LICENCE = """
import importlib.metadata

wheel = importlib.metadata.distribution("grain_jax")
assert "Apache License" in wheel.read_text("licenses/LICENSE")
print(wheel.version, wheel.metadata["License-Expression"], wheel.metadata["Author"])
"""

READ_BACK = """
import sys
sys.modules["grain_jax"] = sys.modules["flax"] = None
import jax, numpy as np
from jax import export

params = jax.device_put(dict(np.load("exported/params.npz")))
read = lambda name: jax.jit(export.deserialize(open(f"exported/{name}.stablehlo", "rb").read()).call)
seen = read("regions")(params, np.zeros((2, 16, 16, 3), np.uint8))
tokens = np.array([[49406, 320, 31970, 49407]], np.int32)
text = read("text")(params, tokens, tokens.argmax(1).astype(np.int32))["text_embed"]
difference = abs(np.asarray(text[0]) - np.load("texts.npy")[0]).max()  # "a wren"
assert seen["boxes_xyxy"].shape == (2, 5, 4) and difference < 1e-5, difference
print("max|a - b| of a text:", difference)
"""


def steps(python: pathlib.Path) -> list[tuple]:
    """(name, words of the command, status, what its output has) of each step."""
    module = lambda *words: [python, "-m", *words]
    command = lambda *words: [python.parent / "grain-jax", *words]
    train = command("train", "--config", "mine.py", "--workdir", "run")
    measure = lambda kind, images, *words: module(
        *("grain_jax.evaluate", kind, "--checkpoint", "run", "--images", images),
        *("--output", f"{kind}.json", "--cache", "", *words),
    )
    of_a = ("--annotations", "A.jsonl")
    return [
        ("pip check", module("pip", "check"), 0, "No broken requirements"),
        ("licence", [python, "-c", LICENCE], 0, "Apache-2.0 grain_jax contributors"),
        ("version", command("--version"), 0, "JAX "),
        ("help", command("evaluate", "zeroshot", "--help"), 0, "--descriptions D.json"),
        ("a typing error", command("trian"), 2, "did you mean train?"),
        (
            "keys",
            command("train", "--config", "own:S/16", "--help-config", "optim"),
            0,
            "layer_dec",
        ),
        ("launch files", command("launch-files", "cluster"), 0, "cluster/slurm.sbatch"),
        ("images", [python, "-c", fresh.IMAGES.format(images_a_class=3)], 0, ""),
        ("train", train, 0, "Everything of this run is in run"),
        ("train, resumed", [*train, "--config.total_steps=6"], 0, "resumed at step 4"),
        ("load, classify, ground", [python, "-c", fresh.LOAD], 0, ""),
        ("zeroshot", measure("zeroshot", "classes"), 0, "6 pictures"),
        ("retrieval", measure("retrieval", ".", *of_a), 0, ""),
        ("grounding", measure("grounding", ".", *of_a), 0, ""),
        (
            "export",
            command("export", "--checkpoint", "run", "--output", "exported"),
            0,
            "regions: boxes_xyxy",
        ),
        ("export, read back", [python, "-c", READ_BACK], 0, ""),
        ("report", command("report", "run"), 0, "report.html"),
        ("verify", command("verify", "run", "--steps", "2"), 0, "Verdict"),
        (
            "records need an extra",
            [*train, "--config.input.source=records", "--workdir=other"],
            2,
            "[data]",
        ),
        (
            "to-torch needs an extra",
            command("convert", "to-torch", "--checkpoint", "run", "--output", "torch"),
            2,
            "pip install",
        ),
        ("demo needs an extra", command("demo", "--checkpoint", "run"), 2, "gradio"),
    ]


def main() -> int:
    """Builds, installs, runs; returns 0, or 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=pathlib.Path, help="new folder for all of it, not removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grain_jax_wheel_") as temporary:
        if args.keep:
            args.keep.mkdir(parents=True)
        folder = (args.keep or pathlib.Path(temporary)).resolve()
        empty = folder / "elsewhere"
        empty.mkdir()
        (empty / "mine.py").write_text(fresh.CONFIG)
        began = time.monotonic()
        try:
            python = fresh.install(str(fresh.build(folder)), "constraints.txt", folder)
            for name, words, status, says in steps(python):
                fresh.run(name, words, empty, fresh.environment(folder), status, says)
        except fresh.Failed as error:
            print(error, file=sys.stderr)
            return 1
        times = os.times()
        print(
            f"the wheel does what a base installation promises; {time.monotonic() - began:.0f} s, of which"
            f" {times.children_user + times.children_system:.0f} s on a processor"
        )
        return 0


if __name__ == "__main__":
    sys.exit(main())
