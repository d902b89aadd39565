"""The wheel with sets of versions, each in a fresh environment: python -m tests.versions.run [SET[:PYTHON] ...]

    python -m tests.versions.run                     # newest on Python 3.13, floors on 3.11
    python -m tests.versions.run default newest:3.12

A set is a file of constraints. The wheel is built once, and installed with its extra `data` at the versions of the set.
Then: every module is imported; images become records; a model is trained on them by TensorFlow, resumed, loaded,
evaluated and packed; losses, tokens and resized images are compared with the goldens of the PyTorch reference.
Two sets run at a time. Prints a line a set; ends with status 1 and the output of the step that failed. Where a Python is not on the machine, the
line says so. Needs PyPI or pip's cache.
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
from concurrent import futures

from tests.wheel import fresh

# Name of a set -> (its file, the Python that it is checked on).
SETS = {
    "default": ("constraints.txt", "3.11"),
    "newest": ("constraints-newest.txt", "3.13"),
    "floors": ("constraints-floors.txt", "3.11"),
}

IMPORTS = """
import importlib, pathlib, pkgutil, sys
import grain_jax

assert "site-packages" in grain_jax.__file__, grain_jax.__file__
# What other extras bring, and programs that ask for them at once.
without = {"apache_beam", "big_vision", "clip_benchmark", "gradio", "open_clip", "torch", "transformers"}
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
named = ["jax", "flax", "orbax-checkpoint", "numpy", "protobuf", "tensorflow-cpu"]
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


def find_python(version: str) -> str | None:
    """The Python of that version (such as 3.13) on this machine."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, candidates):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return python
    return None


def steps(python: pathlib.Path) -> list[tuple[str, list, str]]:
    """(name, words of the command, what its output has) of each step."""
    module = lambda *words: [python, "-m", *words]
    train = [
        *module("grain_jax.train", "--config", "mine.py", "--workdir", "run"),
        *("--config.input.source=records", "--config.input.name=mine"),
        "--config.input.data_dir=records",
    ]
    build = ("--annotations", "A.jsonl", "--images", ".", "--output", "records", "--name", "mine")
    return [
        ("pip check", module("pip", "check"), "No broken requirements"),
        ("imports", [python, "-c", IMPORTS], "modules"),
        ("images", [python, "-c", fresh.IMAGES.format(images_a_class=16)], ""),
        ("build", module("grain_jax.data.build", *build), ""),
        ("train", train, "Everything of this run is in run"),
        ("train, resumed", [*train, "--config.total_steps=6"], "resumed at step 4"),
        ("load, classify, ground", [python, "-c", fresh.LOAD], ""),
        (
            "convert",
            module("grain_jax.convert", "pack", "--input", "run", "--output", "packed"),
            "PROVEN",
        ),
        (
            "evaluate",
            module(
                *("grain_jax.evaluate", "zeroshot", "--checkpoint", "packed"),
                *("--images", "classes", "--output", "zeroshot.json", "--cache", ""),
            ),
            "32 ",
        ),
        ("goldens", [python, "-c", GOLDENS], "preprocessing, tf 26"),
    ]


def check(name: str, version: str, wheel: pathlib.Path, folder: pathlib.Path, quiet: bool) -> bool:
    """Installs and runs a set below `folder`, which is new, and prints its line; returns whether all went well."""
    constraints, _ = SETS[name]
    python = find_python(version)
    if python is None:
        print(f"{name}: Python {version} is not on this machine; not checked", flush=True)
        return True
    began = time.monotonic()
    empty = folder / "elsewhere"
    empty.mkdir(parents=True)
    (empty / "mine.py").write_text(fresh.CONFIG)
    for part in ("benchmarks", "tests/goldens"):
        shutil.copytree(fresh.ROOT / part, empty / part)
    try:
        inside = fresh.install(f"{wheel}[data]", constraints, folder, python, quiet)
        installed = time.monotonic() - began
        variables = fresh.environment(folder)
        versions = fresh.run("versions", [inside, "-c", VERSIONS], empty, variables, quiet=True)
        for step, words, says in steps(inside):
            label = f"{name}: {step}"
            fresh.run(label, words, empty, variables, says=says, quiet=quiet)
    except fresh.Failed as error:
        print(f"{name}: Python {version}, {constraints}: FAILED\n{error}", flush=True)
        return False
    seconds = f"installed in {installed:.0f} s, {time.monotonic() - began:.0f} s in all"
    print(f"{name}: {versions.strip()}; {seconds}; ok", flush=True)
    return True


def main() -> int:
    """Returns 0, or 1 where a set failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sets",
        nargs="*",
        default=["newest", "floors"],
        metavar="SET[:PYTHON]",
        help=f"{', '.join(SETS)} (default: newest floors)",
    )
    parser.add_argument("--steps", action="store_true", help="print a line a step too")
    args = parser.parse_args()
    for given in args.sets:
        if given.split(":")[0] not in SETS:
            parser.error(f"{given}: expected one of {', '.join(SETS)}")
    with tempfile.TemporaryDirectory(prefix="grain_jax_versions_") as temporary:
        folder = pathlib.Path(temporary)
        try:
            wheel = fresh.build(folder, quiet=True)
        except fresh.Failed as error:
            print(error, file=sys.stderr)
            return 1

        def checked(given: str) -> bool:
            name, _, version = given.partition(":")
            own = folder / given.replace(":", "_")
            try:
                return check(name, version or SETS[name][1], wheel, own, not args.steps)
            finally:
                shutil.rmtree(own, ignore_errors=True)

        with futures.ThreadPoolExecutor(max_workers=2) as pool:
            passed = list(pool.map(checked, args.sets))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
