"""A wheel of the tree in fresh environments, and a tiny training run for them."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of the tree, when it is copied.
_LEFT_OUT = (".git", ".venv", "__pycache__", "build", "*.egg-info", "runs", "shared")

CONFIG = """
from grain_jax.evaluate import kinds
from grain_jax.config import recipe


def get_config():
    c = recipe.base("tiny")
    c.update(total_steps=4, batch_size=8, dtype="float32", log_every=2, checkpoint_every=2)
    c.optim.warmup_steps = 1
    c.input.update(source="synthetic", lanes=2)
    c.text.update(pack_group=4, pack_rows=6)
    c.model.image.update(image_size=16, width=32, depth=1, mlp_dim=64, unroll=1)
    c.model.text.update(width=32, depth=1, mlp_dim=64, unroll=1)
    c.model.decoder.update(width=32, depth=1, mlp_dim=64, unroll=1)
    c.evals.places = kinds.evaluator("zeroshot", "classes")
    return c
"""

# Images of two classes below classes/, and A.jsonl with their captions and regions.
IMAGES = """
import json, pathlib, PIL.Image

with open("A.jsonl", "w") as file:
    for name, colour in (("grass", "green"), ("sky", "blue")):
        pathlib.Path("classes", name).mkdir(parents=True)
        for i in range({images_a_class}):
            path = f"classes/{{name}}/{{i}}.png"
            PIL.Image.new("RGB", (32 + i, 24), colour).save(path)
            region = {{"box": [0, 0, 10 + i, 12], "description": f"{{colour}} corner {{i}}", "score": 0.9}}
            line = {{"image": path, "caption": f"{{name}} {{i}}", "regions": [region]}}
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


class Failed(Exception):
    """A step did not do what the installation promises."""


def environment(folder: pathlib.Path) -> dict[str, str]:
    """The variables of a step; what one step compiles into `folder`, the next need not compile again."""
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    return {k: v for k, v in os.environ.items() if k not in left_out} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # As tests/conftest.py: most of the time is compiling.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def run(
    name: str,
    words: list,
    folder: pathlib.Path,
    variables: dict,
    status: int = 0,
    says: str = "",
    quiet: bool = False,
) -> str:
    """Runs a step in `folder`, prints its seconds, status and last line, and returns its output.

    Raises:
      Failed: another status, a traceback, or an output without `says`.
    """
    began = time.monotonic()
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if not quiet:
        seconds = time.monotonic() - began
        print(f"{seconds:6.1f} s  status {done.returncode}  {name}: {last}", flush=True)
    if done.returncode != status or says not in done.stdout or "Traceback" in done.stdout:
        raise Failed(f"{done.stdout}\n{name}: expected status {status}, no traceback, and {says!r}")
    return done.stdout


def build(folder: pathlib.Path, quiet: bool = False) -> pathlib.Path:
    """The wheel of the tree, built into `folder`."""
    # setuptools builds in the tree, and takes what an older build left there.
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*_LEFT_OUT))
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
    run("wheel", [*words, folder / "source"], folder, environment(folder), quiet=quiet)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(
    wheel: str, constraints: str, folder: pathlib.Path, python: str = sys.executable, quiet: bool = False
) -> pathlib.Path:
    """A virtual environment below `folder` with the wheel; returns its Python.

    Args:
      wheel: path of the wheel, with extras in brackets.
      constraints: file of the tree.
    """
    variables = environment(folder)
    run("venv", [python, "-m", "venv", folder / "venv"], folder, variables, quiet=quiet)
    inside = folder / "venv" / "bin" / "python"
    # Python compiles what it imports; all of TensorFlow would take longer.
    words = [inside, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / constraints]
    run("pip install", [*words, wheel], folder, variables, quiet=quiet)
    return inside
