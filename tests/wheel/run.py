"""The wheel in fresh environments and empty folders: python -m tests.wheel.run [SET[:PYTHON] ...]

    python -m tests.wheel.run                     # base, newest on Python 3.13, floors on 3.11
    python -m tests.wheel.run default newest:3.12

A set is a file of constraints. The wheel is built once. `base` installs it without extras, so without TensorFlow and
PyTorch, and goes through what that promises: train from a config file that lies anywhere, load, classify,
evaluate, export and read back, report; what needs an extra must say which. The other sets install it with its
extra `data`: every module is imported; images become records; a model is trained on them by TensorFlow, resumed,
loaded, evaluated and packed; losses, tokens and resized images are compared with the goldens of the PyTorch reference.
Prints a line per step; ends with status 1 and the output of the step that failed. A Python that is not on the machine
is a line. Needs PyPI or pip's cache.
"""

import argparse
import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests import compiling

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Name of a set -> (its file, the Python that it is checked on; None: the one of this process).
SETS = {
    "base": ("constraints.txt", None),
    "default": ("constraints.txt", "3.11"),
    "newest": ("constraints-newest.txt", "3.13"),
    "floors": ("constraints-floors.txt", "3.11"),
}

CONFIG = """
from grain_jax.evaluate import kinds
from grain_jax.config import recipe


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

IMPORTS = """
import importlib, pathlib, pkgutil, sys
import grain_jax

assert "site-packages" in grain_jax.__file__, grain_jax.__file__
# What other extras bring, and programs that ask for them at once.
without = {"apache_beam", "big_vision", "gradio", "open_clip", "torch", "transformers"}
imported, left_out = 0, []
for found in pkgutil.walk_packages(grain_jax.__path__, "grain_jax.", onerror=lambda name: None):
    if found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
        imported += 1
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in without, f"{found.name}: {error}"
        left_out.append(found.name)
assert imported > 150, imported
print(imported, "modules; for other extras:", *left_out)
"""

GOLDENS = """
from benchmarks.parity import groups
for group in ("losses", "tokenizer", "preprocessing, tf"):
    found = groups.compare(group)
    failed = [f"{c.name}: {c.error:.3g} > {c.tolerance:.3g}" for c in found if not c.ok]
    assert found and not failed, (group, failed)
    print(group, len(found))
"""

# (name, words of the command, what its output has, its status): code for Python, or words for grain-jax.
TRAIN = "train --config mine.py --workdir run"
RECORDS = f"{TRAIN} --config.input.source=records --config.input.name=mine --config.input.data_dir=records"
MEASURE = "evaluate {0} --checkpoint run --images {1} --output {0}.json"
LOAD = ("load, classify, ground", LOAD, "", 0)
BASE = (
    ("licence", LICENCE, "Apache-2.0 grain_jax contributors", 0),
    ("version", "--version", "JAX ", 0),
    ("help", "evaluate zeroshot --help", "--descriptions D.json", 0),
    ("a typing error", "trian", "did you mean train?", 2),
    ("keys", "train --config own:S/16 --help-config optim", "layer_dec", 0),
    ("launch files", "launch-files cluster", "cluster/slurm.sbatch", 0),
    ("images", IMAGES.format(images_a_class=3), "", 0),
    ("train", TRAIN, "Everything of this run is in run", 0),
    LOAD,
    ("zeroshot", MEASURE.format("zeroshot", "classes"), "6 pictures", 0),
    ("grounding", MEASURE.format("grounding", ".") + " --annotations A.jsonl", "", 0),
    ("export", "export --checkpoint run --output exported", "regions: boxes_xyxy", 0),
    ("export, read back", READ_BACK, "", 0),
    ("report", "report run", "report.html", 0),
    ("records need an extra", f"{RECORDS} --workdir=other", "[data]", 2),
    ("to-torch", "convert to-torch --checkpoint run --output torch", "pip install", 2),
    ("demo needs an extra", "demo --checkpoint run", "gradio", 2),
)
DATA = (
    ("imports", IMPORTS, "modules", 0),
    ("images", IMAGES.format(images_a_class=16), "", 0),
    ("build", "build --annotations A.jsonl --images . --output records --name mine", "", 0),
    ("train", RECORDS, "Everything of this run is in run", 0),
    ("train, resumed", f"{RECORDS} --config.total_steps=6", "resumed at step 4", 0),
    LOAD,
    ("convert", "convert pack --input run --output packed", "PROVEN", 0),
    ("evaluate", MEASURE.replace("run", "packed", 1).format("zeroshot", "classes"), "32 ", 0),
    ("goldens", GOLDENS, "preprocessing, tf 26", 0),
)


class Failed(Exception):
    """A step did not do what the installation promises."""


def find_python(version: str | None) -> str | None:
    """The Python of that version (such as 3.13) on this machine."""
    if version in (None, f"{sys.version_info.major}.{sys.version_info.minor}"):
        return sys.executable
    pyenv = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))
    return shutil.which(f"python{version}") or next(iter(pyenv), None)


def run(
    name: str, words: list, folder: pathlib.Path, text: str = "", status: int = 0, **variables: str
) -> None:
    """Runs a step in `folder` and prints its seconds and last line.

    Raises:
      Failed: another status, a traceback, or an output without `text`.
    """
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    began = time.monotonic()
    words = list(map(str, words))
    done = subprocess.run(words, cwd=folder, env=environment | variables, **options)
    last = done.stdout.replace("\r", "\n").strip().rpartition("\n")[2]
    print(f"{time.monotonic() - began:6.1f} s  {name}: {last}", flush=True)
    if done.returncode != status or text not in done.stdout or "Traceback" in done.stdout:
        raise Failed(f"{done.stdout}\n{name}: expected status {status}, no traceback, and {text!r}")


def build(folder: pathlib.Path) -> pathlib.Path:
    """The wheel of the tree, built into `folder`."""
    # setuptools builds in the tree, and takes what an older build left there.
    left_out = (".git", ".venv", "__pycache__", "build", "*.egg-info", "runs", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*left_out))
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
    run("wheel", [*words, folder / "source"], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(chosen: str, wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Installs a set below `folder`, which is new, and runs its steps."""
    name, _, version = chosen.partition(":")
    constraints, usual = SETS[name]
    python = find_python(version or usual)
    if python is None:
        print(f"{name}: Python {version or usual} is not on this machine; not checked", flush=True)
        return
    empty, inside = folder / "elsewhere", folder / "venv" / "bin" / "python"
    empty.mkdir(parents=True)
    (empty / "mine.py").write_text(CONFIG)
    extra = "" if name == "base" else "[data]"
    run(f"{name}: venv", [python, "-m", "venv", folder / "venv"], empty)
    # Python compiles what it imports; all of TensorFlow would take longer.
    pip = [inside, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / constraints]
    run(f"{name}: pip install", [*pip, f"{wheel}{extra}"], empty)
    run(f"{name}: pip check", [inside, "-m", "pip", "check"], empty, "No broken")
    if extra:  # behind what reads the wheel alone
        for part in ("benchmarks", "tests/goldens"):
            shutil.copytree(ROOT / part, empty / part)
    # The newest XLA has no such flags; elsewhere they halve the time of compiling.
    flags = {} if name == "newest" else {"XLA_FLAGS": compiling.FLAGS}
    for step, what, text, status in DATA if extra else BASE:
        command = [inside.parent / "grain-jax", *what.split()]
        command = [inside, "-c", what] if "\n" in what else command
        run(f"{name}: {step}", command, empty, text, status, **flags)


def main() -> int:
    """Returns 0, or 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = ["base", "newest", "floors"]
    about = f"{', '.join(SETS)} (default: {' '.join(usual)})"
    parser.add_argument("sets", nargs="*", default=usual, metavar="SET[:PYTHON]", help=about)
    args = parser.parse_args()
    if wrong := [chosen for chosen in args.sets if chosen.split(":")[0] not in SETS]:
        parser.error(f"{wrong[0]}: expected one of {', '.join(SETS)}")
    with tempfile.TemporaryDirectory(prefix="grain_jax_wheel_") as temporary:
        folder = pathlib.Path(temporary)
        try:
            wheel = build(folder)
            for chosen in args.sets:
                check(chosen, wheel, folder / chosen.replace(":", "_"))
                shutil.rmtree(folder / chosen.replace(":", "_"), ignore_errors=True)
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
