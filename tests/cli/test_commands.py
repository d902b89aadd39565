"""`grain-jax`: every command's help and registry, typos, versions; nothing heavy is imported on the way."""

import importlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import grain_jax
from grain_jax.cli import commands
from tests.paths import ROOT

HEAVY = "jax flax tensorflow torch numpy matplotlib ml_collections absl PIL scipy apache_beam etils.epath"

# Prints help of every command and kind, and what heavy was imported for it, or for the list of keys of a config.
_ALL_HELP = f"""
import contextlib, io, json, sys
from grain_jax.cli import commands
out = {{}}
for name in commands.parsers():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        commands.main([*name.split(), "--help"])
    out[name] = text.getvalue()
heavy = sorted(set({HEAVY!r}.split()) & set(sys.modules))
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    commands.main(["train", "--config", "demo", "--help-config"])
heavy += sorted({{"jax", "flax", "tensorflow", "torch"}} & set(sys.modules))
print(json.dumps([out, heavy]))
"""


@pytest.fixture(scope="module")
def helps():
    options = dict(cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    done = subprocess.run([sys.executable, "-c", _ALL_HELP], check=True, **options)
    texts, heavy = json.loads(done.stdout)
    assert heavy == []
    return texts


def test_help_shows_the_flags_that_the_parser_takes_and_fits_80_columns(helps):
    parsers = commands.parsers()
    assert set(helps) == set(parsers)
    assert [name for name, parser in parsers.items() if parser._unknown] == ["annotate"]
    for name, parser in parsers.items():
        text = helps[name]
        assert text.startswith(f"usage: grain-jax {name}") and "\nExample:\n" in text
        body = text.partition("Example:")[0]
        wide = [line for line in body.splitlines() if len(line) > 80 and "  " not in line.strip()]
        assert not wide, (name, wide)
        shown = re.findall(r"^  (?:-h, )?(--[a-z\[]\S+)", body, re.MULTILINE)
        for switch in [flag for flag in shown if "[no-]" in flag]:
            shown += [switch.replace("[no-]", ""), switch.replace("[no-]", "no-")]
        taken = set(parser.flags())
        assert {flag for flag in shown if "[no-]" not in flag} == taken, name
        assert all(flag.help for flags in parser.groups.values() for flag in flags), name


def test_every_command_is_listed_and_has_its_place():
    text = commands.help_text()
    for name, command in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE)
        module, _, function = command[1].partition(":")
        path = module.removeprefix("grain_jax.").replace(".", "/") + ".py"
        source = next(p for p in (ROOT / path, ROOT / "grain_jax" / path) if p.exists())
        assert f"\ndef {function}(" in source.read_text(), command


def test_the_example_of_each_help_parses():
    for name, parser in commands.parsers().items():
        for line in parser.example.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[:2] == ["grain-jax", name.split()[0]]
            commands.declared(words[1]).parse(words[2:])


def test_names_that_the_declarations_repeat():
    from grain_jax.convert import __main__ as convert
    from grain_jax.data import sources
    from grain_jax.data.annotate import arguments, local_chat, passes

    said = {
        flag.name: flag.help
        for name in ("annotate", "convert from-open-clip")
        for flags in commands.parsers()[name].groups.values()
        for flag in flags
    }
    assert said["--source"].startswith(", ".join(sources.SOURCES) + ", or")
    assert said["--passes"].startswith(
        f"some of {','.join(arguments.PASSES)}; all (default) is {','.join(arguments.ALL)};"
    )
    assert local_chat.MODEL in said["--chat"]
    assert sources.Options("").shard_size == arguments.Annotate(images="", output="").shard_size
    assert all(hasattr(passes.Passes, f"_{name}") for name in arguments.PASSES)
    assert set(convert.COMMANDS) == set(commands.parsers()["convert"].kinds)


# What is typed -> what is suggested: in commands, flags and config keys (of `train`).
TYPOS = {
    "annoatte": "annotate",
    "evaluate linear-probe --tain": "--train",
    "export --checkpaoint": "--checkpoint",
    "--config.eqvals=1": "evals",
    "--config.model.text.hedas=1": "model.text.heads",
}


@pytest.mark.parametrize("typed, right", TYPOS.items())
def test_typing_errors_each_get_one_line(typed, right, capsys, monkeypatch):
    # The trainer itself would import JAX: its line is that of the loader of the config.
    train = (commands.COMMANDS["train"][0], f"{__name__}:_load")
    monkeypatch.setitem(commands.COMMANDS, "train", train)
    key = typed.startswith("--")
    with pytest.raises(SystemExit) as end:
        commands.main([*("train --workdir=x --config=demo".split() if key else ()), *typed.split()])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert f"did you mean {right}?" in line


def _load(words):
    from grain_jax.config import loading
    from grain_jax.train import arguments as train

    args = train.Train.parse(words)
    loading.load(args.config, args.overrides)


@pytest.mark.parametrize(
    "name, words, expected",
    [
        ("train", "--config demo --workdir x --process_id=1 --stall_seconds 9", {"process_id": 1}),
        ("train", "--config demo --print_shardings", {"print_shardings": True}),
        ("convert", "from-hf --checkpoint a --output b", {"input": "a"}),
        ("plan", "--config demo --topology v5e:2x2 --json a", {"output": "a"}),
        ("sweep", "--config demo --sweep a --workdir b --dry_run", {"dry_run": True}),
    ],
)
def test_other_spellings(name, words, expected):
    found = commands.declared(name).parse(words.split())
    assert {key: getattr(found, key) for key in expected} == expected


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["--version"])
    lines = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert end.value.code == 0
    assert lines["grain_jax"] == grain_jax.__version__
    assert lines["Python"] == sys.version.split()[0]
    assert lines["JAX"] == importlib.metadata.version("jax")
    assert set(lines) == {"grain_jax", "Python", "JAX", "Flax", "numpy", "TensorFlow"}


def test_modules_of_the_folder_that_it_is_started_in_are_found_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for _ in range(2):
        with pytest.raises(SystemExit):
            commands.main(["--help"])
        assert (sys.path[-1], sys.path.count("")) == ("", 1)
    (tmp_path / "of_this_folder.py").write_text("NAME = 'here'\n")
    assert importlib.import_module("of_this_folder").NAME == "here"
