"""What may import what, lazy and indirect imports counted; that nothing opens a user's path by hand."""

import ast
import graphlib
import os
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.quick

HEAVY = "sklearn jax flax tensorflow torch transformers ml_collections tensorflow_datasets matplotlib"
WITH_CONFIGS = HEAVY.replace("ml_collections", "")
TRAINING, LAST = "tensorflow torch ml_collections", "tensorflow torch transformers sklearn"
# For one process each: modules in the order of their imports, with what none of them, nor those before, may
# load.
CHAINS = (
    (
        ("grain_jax, grain_jax.core.schema, grain_jax.config, grain_jax.cli.commands", HEAVY),
        ("grain_jax.config.points, grain_jax.configs.eval, grain_jax.launch.sweep", WITH_CONFIGS),
        ("grain_jax.input_pipeline.synthetic", "jax tensorflow torch flax"),
        ("grain_jax.input_pipeline.records", "torch flax"),
    ),
    (
        ("grain_jax.losses", TRAINING),
        ("grain_jax.models.grain, grain_jax.train.flops, grain_jax.train.train_step", TRAINING),
        ("grain_jax.inference", "tensorflow torch ml_collections transformers"),
        ("grain_jax.evaluate.__main__, grain_jax.convert.__main__, grain_jax.train.run", LAST),
    ),
)


@pytest.mark.parametrize("chain", CHAINS, ids=("light", "heavy"))
def test_import_boundaries(chain):
    code = "import sys\n" + "".join(
        f"import {modules}\nprint(*{{*{forbidden.split()}}} & {{*sys.modules}})\n"
        for modules, forbidden in chain
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [""] * len(chain)


def test_no_library_prints_lines_when_it_starts():
    code = "import grain_jax.input_pipeline.records as r, jax; print(jax.devices(), r.tf.zeros(1).shape)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_PLATFORMS", "TF_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("] (1,)\n") and done.stderr == ""


# epath has nothing like these: its stat asks for the owner's name, which a container may not know; its
# resolve() follows no links; core/atomic.py waits for the disk, and writes to pipes that nobody reads.
ALLOWED = (
    "os.cpu_count os.sched_getaffinity os.getpid os.kill os._exit os.execv os.dup os.dup2 os.stat os.lstat"
    " os.open os.fsync os.close os.set_blocking os.fdopen os.sysconf os.strerror os.path.realpath"
    " shutil.get_terminal_size"
).split()
ON_FILES = re.compile(r"open|os\.path\.\w+|(os|pathlib|shutil|glob)\.\w+")


def _calls_on_files(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if ON_FILES.fullmatch(name) and name not in ALLOWED:
                yield node.lineno, name


def test_paths_go_through_epath():
    found = []
    for folder in ("grain_jax", "data", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in _calls_on_files(tree)]
    assert not found, "\n".join(found)


# From the bottom up: a module imports its own package or lower ones only (CONTRIBUTING.md has the table).
LAYERS = (
    ("core",),
    ("config",),
    ("runtime",),
    ("cli", "input_pipeline", "models"),
    ("checkpoint", "losses"),
    ("inference",),
    ("evaluate", "convert"),
    ("train", "data", "configs"),
    ("demo", "launch", "report", "__main__"),
)
# At the top of the checkout; in the wheel they lie in grain_jax/.
BESIDE = ("configs", "data", "launch")
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
# It alone names higher modules, in strings: what reads the folders of `convert to-hf`.
TABLES = ("grain_jax.checkpoint.saved_model",)
# A name of a module in a string, as tables of extensions have it.
NAMED = re.compile(r"(grain_jax(?:\.\w+)+)(?::\w+)?")


def _modules():
    """Dotted name -> path of every module; hf_files/ are data, they run where grain_jax is not installed."""
    found = {}
    for folder in ("grain_jax", *BESIDE):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "grain_jax" else ("grain_jax", *parts)
            if "hf_files" not in parts:
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imports(path, modules):
    """(line, module of grain_jax, whether a string names it) of every import but that of `__version__`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names, in_string = [], False
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = NAMED.fullmatch(node.value)
            names, in_string = ([named[1]] if named else []), True
        for name in names:
            if name.split(".")[0] != "grain_jax" or name == "grain_jax.__version__":
                continue
            while name not in modules:
                name = name.rpartition(".")[0]
            yield node.lineno, name, in_string


def _package(module):
    return (module.split(".") + [""])[1]


def test_every_folder_of_modules_is_a_package():
    """A wheel leaves others out."""
    folders = {path.parent for path in _modules().values()} - {ROOT / "grain_jax"}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_every_package_has_a_layer():
    assert {_package(module) for module in _modules()} - {""} == set(LAYER)


def test_no_module_imports_upwards():
    modules, found = _modules(), []
    for module, path in modules.items():
        own = _package(module)
        for line, name, in_string in _imports(path, modules):
            # The package itself has `load`, which reaches high; it stands above all.
            lower = name != "grain_jax" and LAYER[_package(name)] < LAYER.get(own, len(LAYERS))
            if own != _package(name) and not lower and not (in_string and module in TABLES):
                found.append(f"{path.relative_to(ROOT)}:{line}: {module} imports {name}")
    assert not found, "\n".join(found)


def test_no_imports_go_in_a_circle():
    """Between modules, by import statements; a table that names its own package's modules is not one."""
    modules = _modules()
    graph = {
        module: {name for _, name, in_string in _imports(path, modules) if not in_string} - {module}
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them
