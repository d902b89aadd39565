"""Which file `--config` and `--sweep` mean, from any folder; and the list of keys."""

import re

import pytest
from etils import epath

from grain_jax.cli import commands
from grain_jax.config import key_help, listing, loading
from grain_jax.core import errors
from tests.paths import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return epath.Path(tmp_path)


PACKAGED = [
    ("config", "demo", "demo", ""),
    ("config", "own:tiny", "own", ":tiny"),
    ("config", "finetune:open_clip:B/32", "finetune", ":open_clip:B/32"),
    ("config", "configs/own.py:S/16", "own", ":S/16"),
    ("sweep", "learning_rate", "sweeps/learning_rate", ""),
    ("sweep", "configs/sweeps/learning_rate.py", "sweeps/learning_rate", ""),
]


@pytest.mark.parametrize("flag, given, name, argument", PACKAGED)
def test_a_name_is_a_file_of_the_package(folder, capsys, flag, given, name, argument):
    assert loading.find(given, flag) == (str(ROOT / f"configs/{name}.py"), argument)
    assert capsys.readouterr().err == ""


def test_a_file_wins_and_the_other_reading_is_told(folder, capsys):
    (folder / "configs").mkdir()
    own = folder / "configs" / "demo.py"
    own.write_text("")
    assert loading.find("configs/demo.py:x", "config") == ("configs/demo.py", ":x")
    assert loading.find(f"{own}", "config") == (str(own), "")
    assert capsys.readouterr().err == ""
    packaged = str(ROOT / "configs/demo.py")
    assert loading.find("demo", "config") == (packaged, "")
    line = f"--config demo: taken from the package, {packaged}"
    assert (
        capsys.readouterr().err == f"{line}; the file configs/demo.py is named by its whole path\n"
    )
    own.unlink()  # the folder of the user has no such file
    assert loading.find("configs/demo.py", "config") == (packaged, "")
    assert capsys.readouterr().err == f"--config configs/demo.py: {line.split(': ')[1]}\n"


@pytest.mark.parametrize(
    "given, flag, message",
    [
        (
            "dmeo",
            "config",
            "no such file dmeo, and no config of the package has that name; did you mean demo?",
        ),
        ("zzz", "config", "there are: clip_vitb16_cc12m, demo, eval, finetune, grain_vit"),
        ("learning_rates", "sweep", "did you mean learning_rate?"),
    ],
)
def test_an_unknown_name_is_one_line(folder, given, flag, message):
    with pytest.raises(errors.UserError) as caught:
        loading.find(given, flag)
    line = str(caught.value)
    assert line.startswith(f"--{flag}: ") and message in line and "\n" not in line


def _show(capsys, *words):
    with pytest.raises(SystemExit) as end:
        commands.main(words)
    assert end.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_config_lists_keys_with_defaults_or_values(folder, capsys):
    lines = _show(capsys, "train", "--help-config")
    count = len(list(listing.keys()))
    assert lines[0] == f"{count} config keys with their defaults; --config.KEY=VALUE sets one."
    assert "optim.learning_rate = 0.001  (float)" in lines
    place = lines.index("batch_size = 2048  (int, at least 1)")
    assert lines[place + 1] == "    images a step, over all devices"
    assert max(map(len, lines)) <= 80
    some = ["--config", "own:S/16", "--config.seed=7"]
    lines = _show(capsys, "plan", *some, "--help-config", "model.image")
    assert re.fullmatch(r"\d\d config keys of own:S/16; --config.KEY=VALUE sets one.", lines[0])
    assert "model.image.width = 384  (int, 1 to 131,072; default 768)" in lines
    assert _show(capsys, "sweep", *some, "--help-config=seed")[2] == "seed = 7  (int; default 0)"
    lines = _show(capsys, "train", "--config=demo", "--help-config=evals.unseen")
    assert "evals.unseen.names = False" in lines


def test_help_config_of_no_key():
    with pytest.raises(errors.UserError, match=r"--help-config optm: .* did you mean optim\?"):
        key_help.show("optm", None, [])
