"""The wheel in fresh environments: python -m tests.wheel.run [SET[:PYTHON] ...] [--steps] [--jobs N]

    python -m tests.wheel.run                     # base, newest on Python 3.13, floors on 3.11
    python -m tests.wheel.run default newest:3.12

A set is a file of constraints. The wheel is built once. `base` installs it without extras, so without
TensorFlow and PyTorch. It trains from a config file anywhere, loads, classifies, evaluates, exports, reads
back and reports. What needs an extra must say which. The others install it with its extra `data` and import
every module. They make records of images, train a model on them, resume, load, evaluate and pack it. Losses,
tokens and resized images are compared with the goldens of the PyTorch reference. Prints a line per set, which
says so if a Python is missing; status 1 and the output of a step that failed. Needs PyPI or pip's cache.
"""

import argparse
import functools
import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent import futures

from tests import compiling
from tests.wheel import fresh

# Name of a set -> (its file, the Python that it is checked on; None: the one of this process).
SETS = {
    "base": ("constraints.txt", None),
    "default": ("constraints.txt", "3.11"),
    "newest": ("constraints-newest.txt", "3.13"),
    "floors": ("constraints-floors.txt", "3.11"),
}

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

VERSIONS = """
import platform
from importlib import metadata
named = ["jax", "flax", "orbax-checkpoint", "numpy", "protobuf"]
print("Python", platform.python_version(), *(f"{name} {metadata.version(name)}" for name in named))
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
LOAD = ("load, classify, ground", fresh.LOAD, "", 0)
BASE = (
    ("licence", LICENCE, "Apache-2.0 grain_jax contributors", 0),
    ("version", "--version", "jax ", 0),
    ("help", "evaluate zeroshot --help", "--descriptions D.json", 0),
    ("a typing error", "trian", "did you mean train?", 2),
    ("keys", "train --config own:S/16 --help-config optim", "layer_dec", 0),
    ("launch files", "launch-files cluster", "cluster/slurm.sbatch", 0),
    ("images", fresh.IMAGES.format(images_a_class=3), "", 0),
    ("train", TRAIN, "Everything of this run is in run", 0),
    LOAD,
    ("zeroshot", MEASURE.format("zeroshot", "classes"), "alpha_1.0/top1", 0),
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
    ("images", fresh.IMAGES.format(images_a_class=16), "", 0),
    ("build", "build --annotations A.jsonl --images . --output records --name mine", "", 0),
    ("train", RECORDS, "Everything of this run is in run", 0),
    ("train, resumed", f"{RECORDS} --config.total_steps=6", "resumed at step 4", 0),
    LOAD,
    ("convert", "convert pack --input run --output packed", "PROVEN", 0),
    ("evaluate", MEASURE.replace("run", "packed", 1).format("zeroshot", "classes"), "alpha_1.0/top1", 0),
    ("goldens", GOLDENS, "preprocessing, tf 26", 0),
)


def find_python(version: str | None) -> str | None:
    """The Python of that version (such as 3.13) on this machine."""
    if version is None:
        return sys.executable
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, candidates):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return python
    return None


def check(given: str, wheel: pathlib.Path, folder: pathlib.Path, quiet: bool) -> bool:
    """Installs and runs a set below `folder`, a new one, and prints its line; returns whether it passed."""
    name, _, version = given.partition(":")
    constraints, own = SETS[name]
    python = find_python(version or own)
    if python is None:
        print(f"{name}: Python {version or own} is not on this machine; not checked", flush=True)
        return True
    began = time.monotonic()
    empty = folder / "elsewhere"
    empty.mkdir(parents=True)
    (empty / "mine.py").write_text(fresh.CONFIG)
    variables = fresh.environment(folder)
    if name != "newest":  # whose XLA has no such flag; elsewhere it halves the time of compiling
        variables["XLA_FLAGS"] = compiling.FLAGS
    run = functools.partial(fresh.run, folder=empty, variables=variables)
    try:
        extra = "" if name == "base" else "[data]"
        inside = fresh.install(f"{wheel}{extra}", constraints, folder, python, quiet)
        installed = time.monotonic() - began
        versions = run("versions", [inside, "-c", VERSIONS], quiet=True)
        run(f"{name}: pip check", [inside, "-m", "pip", "check"], says="No broken", quiet=quiet)
        if extra:  # behind what reads the wheel alone
            for part in ("benchmarks", "tests/goldens"):
                shutil.copytree(fresh.ROOT / part, empty / part)
        for step, what, says, status in DATA if extra else BASE:
            command = [inside.parent / "grain-jax", *what.split()]
            command = [inside, "-c", what] if "\n" in what else command
            run(f"{name}: {step}", command, status=status, says=says, quiet=quiet)
    except fresh.Failed as error:
        print(f"{name}: {python}, {constraints}: FAILED\n{error}", flush=True)
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = f"installed in {installed:.0f} s, {time.monotonic() - began:.0f} s in all"
    print(f"{name}: {versions.strip()}; {seconds}; ok", flush=True)
    return True


def main() -> int:
    """Returns 0, or 1 where a set failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = ["base", "newest", "floors"]
    about = f"{', '.join(SETS)} (default: {' '.join(usual)})"
    parser.add_argument("sets", nargs="*", default=usual, metavar="SET[:PYTHON]", help=about)
    parser.add_argument("--steps", action="store_true", help="print a line a step too")
    parser.add_argument("--jobs", type=int, default=2, help="sets that run at a time (default: 2)")
    args = parser.parse_args()
    if wrong := [given for given in args.sets if given.split(":")[0] not in SETS]:
        parser.error(f"{wrong[0]}: expected one of {', '.join(SETS)}")
    with tempfile.TemporaryDirectory(prefix="grain_jax_wheel_") as temporary:
        folder = pathlib.Path(temporary)
        try:
            wheel = fresh.build(folder, quiet=True)
        except fresh.Failed as error:
            print(error, file=sys.stderr)
            return 1
        one = lambda x: check(x, wheel, folder / x.replace(":", "_"), not args.steps)
        with futures.ThreadPoolExecutor(max_workers=args.jobs) as pool:
            return 0 if all(list(pool.map(one, args.sets))) else 1


if __name__ == "__main__":
    sys.exit(main())
