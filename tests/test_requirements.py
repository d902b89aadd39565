"""setup.py declares what grain_jax imports: with the package itself, or with the extras that bring it."""

import ast
import re
import runpy
import sys

import pytest
import setuptools

from tests.paths import ROOT

# Top-level module -> the distribution that has it, where the names differ.
DISTRIBUTION = {
    "PIL": "pillow",
    "absl": "absl-py",
    "faiss": "faiss-cpu",
    "instant_clip_tokenizer": "instant-clip-tokenizer",
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
    "faiss-cpu": {"faiss"},
    "gradio": {"demo"},
    "httpx": {"annotate"},
    "huggingface_hub": {"hub"},
    "instant-clip-tokenizer": {"fast-tokenizer"},
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
HOSTS = {"big_vision", "clip_benchmark"}


def _setup(monkeypatch):
    """What setup.py hands to setuptools."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: found.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def _declared(monkeypatch):
    """(base requirements, extra -> requirements), names alone."""
    found = _setup(monkeypatch)
    names = lambda lines: {re.match(r"[\w.-]+", line)[0] for line in lines}
    extras = {extra: names(lines) for extra, lines in found["extras_require"].items()}
    return names(found["install_requires"]), extras


def _imported():
    """Distribution -> a file that imports something of it, anywhere in its code."""
    found = {}
    for path in sorted((ROOT / "grain_jax").rglob("*.py")):
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


def test_imports_are_declared(monkeypatch):
    base, extras = _declared(monkeypatch)
    imported = _imported()
    assert {"jax", "flax", "pillow", "tensorflow-cpu"} <= imported.keys()
    missing = {name: file for name, file in imported.items() if name not in base}
    assert missing.keys() == EXTRAS.keys(), missing
    for name, expected in EXTRAS.items():
        assert {extra for extra, has in extras.items() if name in has} - {"dev"} == expected, name
        assert name in extras["dev"]


def test_what_others_import_for_us_is_declared(monkeypatch):
    """`serialize` and `deserialize` of jax.export import flatbuffers, on which JAX does not depend."""
    base, _ = _declared(monkeypatch)
    assert "flatbuffers" in base


def _pins(name):
    """Distribution -> version, of a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.split("==|<=", line) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_constraints_pin_what_is_declared(monkeypatch, name):
    base, extras = _declared(monkeypatch)
    needed = (base | extras["dev"]) - {"tensorflow"}  # macOS's, beside tensorflow-cpu
    assert not needed - _pins(name).keys(), needed - _pins(name).keys()


def test_the_lower_bounds_are_the_floors_that_are_run(monkeypatch):
    found = _setup(monkeypatch)
    floors = _pins("constraints-floors.txt")
    short = lambda version: re.sub(r"(\.0)+$", "", version)
    for line in found["install_requires"] + found["extras_require"]["data"]:
        name, bound = re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", line).groups()
        if name != "tensorflow":
            assert short(floors[name]) == short(bound), line


def test_hints_name_the_package_and_an_extra_that_it_has(monkeypatch):
    """`pip install 'grain_jax[X]'` is right for a wheel and for a checkout; `-e .` for a checkout alone."""
    _, extras = _declared(monkeypatch)
    found = []
    for folder in ("grain_jax", "data", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            assert not re.search(r"pip install [^\n]*-e ", text), path
            found += re.findall(r"grain_jax\[([\w,-]+)\]", text)
    assert len(found) > 15 and set(",".join(found).split(",")) <= extras.keys()
