"""The file that `--config` and `--sweep` mean, what the command line changes, and `--help-config`."""

import re
import sys

import pytest
from etils import epath

from grain_jax.__main__ import main
from grain_jax.config import loading
from grain_jax.config.fields import Config
from grain_jax.config.keys import listed
from grain_jax.core import errors
from tests.paths import ROOT

# A user's folder: a config, the file beside it that it imports, and faulty configs.
FILES = {
    "shared.py": "BATCH = 24\n",
    "mine.py": """
import shared
from grain_jax.config.recipe import base

def get_config(size="tiny"):
    c = base(size)
    c.total_steps, c.optim.warmup_steps = 5, 1
    c.batch_size = shared.BATCH
    c.input.lanes, c.text.pack_group = 1, 24
    return c
""",
    "fails.py": "def get_config(size=0):\n    return 1 / size\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Such a folder below the working directory."""
    folder = epath.Path(tmp_path) / "meine Bilder, größer"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    yield folder
    sys.modules.pop("shared", None)


@pytest.mark.parametrize(
    "flag, text, name, argument",
    [
        ("config", "finetune:hf://a/b", "finetune", ":hf://a/b"),
        ("config", "configs/own.py:S/16", "own", ":S/16"),
        ("sweep", "learning_rate", "sweeps/learning_rate", ""),
    ],
)
def test_a_name_is_a_file_of_the_package(folder, flag, text, name, argument):
    assert loading.find(text, flag) == (str(ROOT / f"grain_jax/configs/{name}.py"), argument)


def test_a_file_wins_over_the_package(folder):
    here, packaged = epath.Path("configs/demo.py"), str(ROOT / "grain_jax/configs/demo.py")
    assert loading.find("configs/demo.py", "config") == (packaged, "")
    here.parent.mkdir()
    here.write_text("")
    assert loading.find("configs/demo.py:x", "config") == ("configs/demo.py", ":x")
    assert loading.find("demo", "config") == (packaged, "")


def test_a_config_anywhere_on_the_disk_works(folder, monkeypatch):
    for path, cwd, width in (
        ("mine.py", folder, 96),
        (f"../{folder.name}/mine.py:S/16", folder, 384),
        (f"{folder.name}/mine.py", folder.parent, 96),
        (str(folder / "mine.py:B/16"), "/", 768),
    ):
        monkeypatch.chdir(cwd)
        c = loading.load(path)
        assert (c.batch_size, c.model.image.width) == (24, width)


# The arguments of `load`, and what its one line says.
FAULTS = [
    (("fails.py",), "fails.py:2: ZeroDivisionError: division by zero"),
    (("mine.py:L/15",), "mine.py:6: ValueError: model size: got 'L/15', expected one of tiny, S/"),
    (("dmeo",), "--config: no such file dmeo.* did you mean demo"),
    ((None,), "--config: missing"),
    (("demo", "batch_size=abc"), "^--config.batch_size: got 'abc', expected int, at least 1$"),
    (("demo", "mesh=3"), "flag --config.mesh=3: Failed to parse '3' as a ConfigDict"),
    (("demo", "evals.sen=None"), "--config.evals.sen: no such key; did you mean evals.seen"),
    (("grain_vitb16_cc12m", "total_epochs=None"), "total_steps, total_epochs: exactly one must be set"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", FAULTS)
def test_a_fault_is_one_line(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", ".", str(ROOT))])
    file, *keys = arguments
    with pytest.raises(errors.UserError, match=message) as caught:
        loading.load(file, [f"--config.{key}" for key in keys])
    assert "\n" not in str(caught.value)


def test_the_command_line_wins_over_the_file():
    def load(*keys, file="grain_vitb16_cc12m"):
        return loading.load(file, [f"--config.{key}" for key in keys])

    c = load("total_steps=100", "optim.warmup_steps=5")
    assert (c.total_steps, c.total_epochs) == (100, None)
    assert (c.optim.warmup_steps, c.optim.warmup_epochs) == (5, None)
    assert load("total_steps=100", "total_epochs=None").total_steps == 100
    assert load("total_epochs=None", "total_epochs=3").total_epochs == 3
    assert list(load("evals=None", file="demo").evals) == []
    # An evaluator that the command line changes was asked for: without its data the run ends.
    changed = load("evals.unseen.names=True", file="demo").evals
    missing = {name: entry["missing"] for name, entry in changed.items()}
    assert missing.pop("unseen") == "error" and set(missing.values()) == {"skip"}
    others = ["grounding", "parts", "retrieval", "unseen"]
    assert list(load("evals.seen=None", file="demo").evals) == others


def test_help_config_lists_keys_with_defaults_or_values(folder, capsys):
    def show(*words):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        return capsys.readouterr().out.splitlines()

    lines = show("train", "--help-config")
    assert lines[0].startswith(f"{len(list(listed(Config)))} ")
    assert "optim.learning_rate = 0.001  (float)" in lines
    assert "batch_size = 2048  (int, at least 1)" in lines and max(map(len, lines)) <= 80
    changed = ["--config", "own:S/16", "--config.seed=7"]
    lines = show("plan", *changed, "--help-config", "model.image")
    assert re.match(r"\d\d .* own:S/16", lines[0])
    assert "model.image.width = 384  (int, 1 to 131,072, default 768)" in lines
    assert "evals.unseen.names = False" in show("train", "--config=demo", "--help-config=evals.unseen")
