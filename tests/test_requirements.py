"""pyproject.toml declares what grain_jax imports, in base or extra, and the files beside its modules."""

import ast
import fnmatch
import re
import sys
import tomllib

import pytest

from tests.paths import ROOT

# Top-level module -> the distribution that has it, where the names differ.
DISTRIBUTION = {
    "PIL": "pillow",
    "absl": "absl-py",
    "apache_beam": "apache-beam",
    "faster_coco_eval": "faster-coco-eval",
    "jaxlib": "jax",  # requires it
    "open_clip": "open_clip_torch",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "starlette": "gradio",  # requires it
    "tensorflow": "tensorflow-cpu",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorstore": "orbax-checkpoint",  # requires it
    "threadpoolctl": "scikit-learn",  # requires it
    "timm": "open_clip_torch",  # requires it
}
# What the base installation has not -> the extras that bring it.
EXTRAS = {
    "apache-beam": {"annotate"},
    "faster-coco-eval": {"detection"},
    "gradio": {"demo"},
    "httpx": {"annotate"},
    "huggingface_hub": {"hub"},
    "onnx": {"interop"},
    "onnxruntime": {"interop"},
    "onnxscript": {"interop"},
    "open_clip_torch": {"interop"},
    "pyarrow": {"embed"},
    "safetensors": {"hub", "interop"},
    "scikit-learn": {"probe"},
    "sentencepiece": {"interop"},
    "tensorflow-cpu": {"data"},
    "tensorflow-datasets": {"data"},
    "torch": {"torch", "interop", "annotate"},
    "transformers": {"interop", "annotate"},
    "wandb": {"wandb"},
}
# They import us.
HOSTS = {"big_vision"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BASE: list = PROJECT["project"]["dependencies"]
EXTRA: dict = PROJECT["project"]["optional-dependencies"]


def _names(lines):
    """Distributions of requirements; of an extra of our own, those that it brings."""
    found = set()
    for line in lines:
        if own := re.fullmatch(r"grain_jax\[(.*)\]", line):
            found |= _names([line for extra in own[1].split(",") for line in EXTRA[extra]])
        else:
            found.add(re.match(r"[\w.-]+", line)[0])
    return found


def _sources():
    return [path for name in ("grain_jax", "data", "launch") for path in sorted((ROOT / name).rglob("*.py"))]


def _imported():
    """Distribution -> a file that imports something of it, anywhere in its code."""
    found = {}
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top not in HOSTS | {"grain_jax"}:
                    found[DISTRIBUTION.get(top, top)] = path.name
    return found


def test_imports_are_declared():
    base, imported = _names(BASE), _imported()
    assert {"jax", "flax", "pillow", "tensorflow-cpu"} <= imported.keys()
    missing = {name: file for name, file in imported.items() if name not in base}
    assert missing.keys() == EXTRAS.keys(), missing
    for name, expected in EXTRAS.items():
        brings = {extra for extra, lines in EXTRA.items() if name in _names(lines)}
        assert brings == {*expected, "dev"}, name
    # `serialize` and `deserialize` of jax.export import it, and JAX does not depend on it.
    assert "flatbuffers" in base


def test_the_files_beside_the_modules_are_in_the_wheel():
    tools = PROJECT["tool"]["setuptools"]
    folders = {"grain_jax": "grain_jax"}
    folders |= {f"grain_jax.{name}": name for name in ("configs", "data", "launch")}  # by links
    given = [f"{folders[x]}/{one}" for x, files in tools["package-data"].items() for one in files]
    for folder in folders.values():
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(fnmatch.fnmatch(name, pattern) for pattern in given), name


def _pins(name):
    """Distribution -> version, of a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.split("==|<=", line) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_constraints_pin_what_is_declared(name):
    needed = _names([*BASE, *EXTRA["dev"]]) - {"tensorflow"}  # macOS's, beside tensorflow-cpu
    assert not needed - _pins(name).keys(), needed - _pins(name).keys()


def test_the_lower_bounds_are_the_floors_that_are_run():
    floors = _pins("constraints-floors.txt")
    short = lambda version: re.sub(r"(\.0)+$", "", version)
    for line in BASE + EXTRA["data"]:
        name, bound = re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", line).groups()
        if name != "tensorflow":
            assert short(floors[name]) == short(bound), line


def test_hints_name_the_package_and_an_extra_that_it_has():
    """`pip install 'grain_jax[X]'` is right for a wheel and for a checkout; `-e .` for a checkout alone."""
    found = []
    for path in _sources():
        text = path.read_text()
        assert not re.search(r"pip install [^\n]*-e ", text), path
        found += re.findall(r"grain_jax\[([\w,-]+)\]", text)
    assert len(found) > 8 and set(",".join(found).split(",")) <= EXTRA.keys()
