"""`grain-jax`: every command's help and place, typing errors, versions; help imports nothing heavy."""

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
from grain_jax.__main__ import COMMANDS, main
from grain_jax.cli import commands
from tests.paths import ROOT

HEAVY = "jax flax tensorflow torch numpy matplotlib ml_collections absl PIL scipy apache_beam etils.epath"
PARSERS = commands.parsers(COMMANDS)

# Prints help of every command and kind, and what heavy was imported for it, or for the keys of a config.
_ALL_HELP = f"""
import contextlib, io, json, sys
from grain_jax.__main__ import main
out = {{}}
for name in {list(PARSERS)!r}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    out[name] = text.getvalue()
heavy = sorted(set({HEAVY!r}.split()) & set(sys.modules))
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["train", "--config", "demo", "--help-config"])
heavy += sorted({{"jax", "flax", "tensorflow", "torch"}} & set(sys.modules))
print(json.dumps([out, heavy]))
"""


def test_help_shows_the_flags_that_the_parser_takes_and_fits_80_columns():
    options = dict(cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    done = subprocess.run([sys.executable, "-c", _ALL_HELP], check=True, **options)
    helps, heavy = json.loads(done.stdout)
    assert heavy == []
    assert [name for name, parser in PARSERS.items() if parser._unknown] == ["annotate"]
    for name, parser in PARSERS.items():
        text = helps[name]
        assert text.startswith(f"usage: grain-jax {name}") and "\nExample:\n" in text
        body = text.partition("Example:")[0]
        wide = [line for line in body.splitlines() if len(line) > 80 and "  " not in line.strip()]
        assert not wide, (name, wide)
        shown = re.findall(r"^  (?:-h, )?(--[a-z\[]\S+)", body, re.MULTILINE)
        for switch in [flag for flag in shown if "[no-]" in flag]:
            shown += [switch.replace("[no-]", ""), switch.replace("[no-]", "no-")]
        assert {flag for flag in shown if "[no-]" not in flag} == set(parser.flags()), name
        assert all(flag.help for flags in parser.groups.values() for flag in flags), name


def test_commands_are_listed_and_have_their_functions():
    for name, (_, main_function) in COMMANDS.items():
        assert re.search(rf"^  {name} +\w", commands.help_text(COMMANDS), re.MULTILINE)
        module, _, function = main_function.partition(":")
        path = module.replace(".", "/") + ".py"
        source = next(p for p in (ROOT / path, ROOT / "grain_jax" / path) if p.exists())
        assert re.search(rf"^(def )?{function}( = |\()", source.read_text(), re.MULTILINE)


def test_the_example_of_each_help_parses():
    for name, parser in PARSERS.items():
        for line in parser.example.replace("\\\n", " ").splitlines():
            line = shlex.split(line)
            assert line[:2] == ["grain-jax", name.split()[0]]
            commands.declared(COMMANDS, line[1]).parse(line[2:])


# What is typed -> what is suggested: in commands, flags and config keys (of `train`).
TYPOS = {
    "annoatte": "annotate",
    "evaluate linear-probe --tain": "--train",
    "train --workdir=x --config=demo --config.eqvals=1": "evals",
    "train --workdir=x --config=demo --config.model.text.hedas=1": "model.text.heads",
}


@pytest.mark.parametrize("typed, right", TYPOS.items())
def test_typing_errors_each_get_one_line(typed, right, capsys, monkeypatch):
    # The trainer itself would import JAX; the loader of the config writes its line.
    original, train = commands._import, COMMANDS["train"][1]
    monkeypatch.setattr(commands, "_import", lambda x: _load if x == train else original(x))
    with pytest.raises(SystemExit) as end:
        main(typed.split())
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert f"did you mean {right}?" in line


def _load(line):
    from grain_jax.config import loading
    from grain_jax.train import arguments as train

    args = train.Train.parse(line)
    loading.load(args.config, args.overrides)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[0] == f"grain_jax {grain_jax.__version__}"
    assert f"jax {importlib.metadata.version('jax')}" in lines


def test_modules_of_the_folder_that_it_is_started_in_are_found_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert (sys.path[-1], sys.path.count("")) == ("", 1)
    (tmp_path / "of_this_folder.py").write_text("NAME = 'here'\n")
    assert importlib.import_module("of_this_folder").NAME == "here"


@pytest.mark.parametrize("closed", ["|", "1>&-", "2>&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_nobody_reads_give_no_traceback(closed, unbuffered):
    command = f"exec {shlex.quote(sys.executable)} -m grain_jax --version {closed.replace('|', '')}"
    reader, writer = os.pipe()
    if closed == "|":
        os.close(reader)  # as `head -c0` does
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141 if closed == "|" else 0, b"")
    if closed != "|":
        assert os.read(reader, 9) == (b"grain_jax" if closed == "2>&-" else b"")
        os.close(reader)
