"""What may import what, with indirect imports counted; and that nothing opens a user's path by hand."""

import ast
import subprocess
import sys

import pytest

from tests.paths import ROOT

HEAVY = [
    "sklearn",
    "jax",
    "flax",
    "tensorflow",
    "torch",
    "transformers",
    "ml_collections",
    "tensorflow_datasets",
    "matplotlib",
]


def _loaded(module):
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module,forbidden",
    [
        ("grain_jax", set(HEAVY)),
        ("grain_jax.schema", set(HEAVY)),
        ("grain_jax.config", set(HEAVY)),
        ("grain_jax.recipe.points, grain_jax.recipe.suite", {*HEAVY} - {"ml_collections"}),
        ("grain_jax.losses", {"flax", "tensorflow", "torch", "ml_collections"}),
        ("grain_jax.models.grain", {"tensorflow", "torch", "ml_collections"}),
        ("grain_jax.training.flops", {"tensorflow", "torch", "ml_collections"}),
        ("grain_jax.training.train_step", {"tensorflow", "torch", "ml_collections"}),
        ("grain_jax.inference", {"tensorflow", "torch", "ml_collections", "transformers"}),
        ("grain_jax.train", {"tensorflow", "torch", "transformers"}),
        ("grain_jax.evaluate.__main__", {"tensorflow", "torch", "transformers", "sklearn"}),
        ("grain_jax.convert.__main__", {"tensorflow", "torch", "transformers"}),
        ("grain_jax.input_pipeline.synthetic", {"jax", "tensorflow", "torch", "flax"}),
        ("grain_jax.input_pipeline.records", {"torch", "flax"}),
    ],
)
def test_import_boundaries(module, forbidden):
    assert not _loaded(module) & forbidden


def test_importing_the_package_is_quick():
    code = "import time; t = time.perf_counter(); import grain_jax; print(time.perf_counter() - t)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2


def _calls_on_files(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "open":
                yield node.lineno, "open("
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                if node.func.value.id == "os" and node.func.attr not in (
                    "cpu_count",
                    "sched_getaffinity",
                    "getpid",
                    "kill",
                    "_exit",
                    "dup",
                    "dup2",
                    "stat",  # epath's asks for the owner's name, which a container may not know
                    "sysconf",
                ):
                    yield node.lineno, f"os.{node.func.attr}("
                if node.func.value.id in ("pathlib", "shutil", "glob"):
                    yield node.lineno, f"{node.func.value.id}.{node.func.attr}("
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            if (
                isinstance(node.value.value, ast.Name)
                and (
                    node.value.value.id,
                    node.value.attr,
                )
                == ("os", "path")
                and node.attr != "realpath"
            ):  # epath's resolve() follows no links
                yield node.lineno, f"os.path.{node.attr}"


def test_paths_go_through_epath():
    found = []
    for folder in ("grain_jax", "data", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            found += [
                f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in _calls_on_files(tree)
            ]
    assert not found, "\n".join(found)
