"""The wheel alone, in a fresh environment and in an empty folder: python tests/wheel/run.py [--keep FOLDER]

Builds the wheel, installs it without extras (so without TensorFlow and PyTorch) at the versions of
constraints.txt, and goes through what a base installation promises: train from a config file that lies
anywhere, resume, load, classify, evaluate, export and read back, report, verify; what needs an extra must
say which. Prints a line a step; ends with status 1 and the output of the step that failed. Needs PyPI or
pip's cache. The environment and the folder are removed at the end unless --keep names them.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of the tree, when it is copied.
LEFT_OUT = (".git", ".venv", "__pycache__", "build", "*.egg-info", "runs", "shared")

CONFIG = """
from grain_jax import recipe


def get_config():
    c = recipe.base("tiny")
    c.total_steps = 4
    c.optim.warmup_steps = 1
    c.batch_size = 8
    c.dtype = "float32"
    c.log_every = 2
    c.checkpoint_every = 2
    c.input.source = "synthetic"
    c.input.lanes = 2
    c.text.pack_group = 4
    c.text.pack_rows = 6
    c.model.image.update(image_size=16, width=32, depth=1, mlp_dim=64, unroll=1)
    c.model.text.update(width=32, depth=1, mlp_dim=64, unroll=1)
    c.model.decoder.update(width=32, depth=1, mlp_dim=64, unroll=1)
    c.evals.places = recipe.evaluator("zeroshot", "classes")
    return c
"""

PICTURES = """
import json, pathlib, PIL.Image

with open("A.jsonl", "w") as file:
    for name, colour in (("grass", "green"), ("sky", "blue")):
        pathlib.Path("classes", name).mkdir(parents=True)
        for i in range(3):
            path = f"classes/{name}/{i}.png"
            PIL.Image.new("RGB", (32 + i, 24), colour).save(path)
            region = {"box": [0, 0, 10 + i, 12], "description": f"{colour} corner {i}", "score": 0.9}
            line = {"image": path, "caption": f"{name} {i}", "regions": [region]}
            file.write(json.dumps(line) + "\\n")
"""

LOAD = """
import sys
import numpy as np, PIL.Image
import grain_jax

model = grain_jax.load("run")
images = [PIL.Image.open(f"classes/{name}/0.png") for name in ("grass", "sky")]
scores = model.classify(images, {"grass": ["green corner"], "sky": ["blue corner"]}, alpha=0.5)
assert scores.shape == (2, 2) and np.isfinite(scores).all(), scores
(found,) = model.ground(images[0], ["a green corner"])
assert found.box_xyxy.shape == (4,) and -1 <= found.score <= 1, found
np.save("texts.npy", model.encode_text(["a wren", "a house by the sea"]))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"tensorflow", "torch"}, loaded
print(scores.round(3).tolist(), found)
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


class Failed(Exception):
    """A step did not do what a base installation promises."""


def run(
    name: str, words: list, folder: pathlib.Path, environment: dict, status: int = 0, says: str = ""
) -> None:
    """Runs a step and prints its seconds, status and last line; `says` must be in its output."""
    began = time.monotonic()
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    print(
        f"{time.monotonic() - began:6.1f} s  status {done.returncode}  {name}: {last}", flush=True
    )
    ok = done.returncode == status and says in done.stdout and "Traceback" not in done.stdout
    if not ok:
        raise Failed(f"{done.stdout}\n{name}: expected status {status}, no traceback, and {says!r}")


def steps(python: pathlib.Path) -> list[tuple]:
    """(name, words of the command, status, what its output has) of each step."""
    module = lambda *words: [python, "-m", *words]  # noqa: E731
    train = module("grain_jax.train", "--config", "mine.py", "--workdir", "run")
    measure = lambda kind, images, *words: module(  # noqa: E731
        *("grain_jax.evaluate", kind, "--checkpoint", "run", "--images", images),
        *("--output", f"{kind}.json", "--cache", "", *words),
    )
    of_a = ("--annotations", "A.jsonl")
    return [
        ("pip check", module("pip", "check"), 0, "No broken requirements"),
        ("pictures", [python, "-c", PICTURES], 0, ""),
        ("train", train, 0, "Everything of this run is in run"),
        ("train, resumed", [*train, "--config.total_steps=6"], 0, "resumed at step 4"),
        ("load, classify, ground", [python, "-c", LOAD], 0, ""),
        ("zeroshot", measure("zeroshot", "classes"), 0, "6 pictures"),
        ("retrieval", measure("retrieval", ".", *of_a), 0, ""),
        ("grounding", measure("grounding", ".", *of_a), 0, ""),
        (
            "export",
            module("grain_jax.export", "--checkpoint", "run", "--output", "exported"),
            0,
            "regions: boxes_xyxy",
        ),
        ("export, read back", [python, "-c", READ_BACK], 0, ""),
        ("report", module("grain_jax.report", "run"), 0, "report.html"),
        ("verify", module("grain_jax.verify", "run", "--steps", "2"), 0, "Verdict"),
        (
            "records need an extra",
            [*train, "--config.input.source=records", "--workdir=other"],
            2,
            "[data]",
        ),
        (
            "to-torch needs an extra",
            module("grain_jax.convert", "to-torch", "--input", "run", "--output", "torch"),
            2,
            "pip install",
        ),
        ("demo needs an extra", module("grain_jax.demo", "--checkpoint", "run"), 2, "gradio"),
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
        (empty / "mine.py").write_text(CONFIG)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            # As tests/conftest.py: most of the time is compiling.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        began = time.monotonic()
        # setuptools builds in the tree, and takes what an older build left there.
        shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
        try:
            wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
            run("wheel", [*wheel, folder / "source"], empty, environment)
            run("venv", [sys.executable, "-m", "venv", folder / "venv"], empty, environment)
            python = folder / "venv/bin/python"
            install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
            run("pip install", [*install, *folder.glob("*.whl")], empty, environment)
            for name, words, status, says in steps(python):
                run(name, words, empty, environment, status, says)
        except Failed as error:
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
