"""`grain-jax`: every command's help and registry, typos, versions; nothing heavy is imported on the way."""

import importlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys

import pytest

import grain_jax
from grain_jax.cli import commands
from grain_jax.cli.parser import Switch
from grain_jax.config import listing
from tests.paths import ROOT

HEAVY = "jax flax tensorflow torch numpy matplotlib ml_collections absl PIL scipy apache_beam etils"

# Prints help of every command and kind, then what was imported and the CPU seconds of the slowest.
_ALL_HELP = f"""
import contextlib, io, json, sys, time
from grain_jax.cli import commands
out = {{}}
for name in commands.parsers():
    began, text = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        commands.main([*name.split(), "--help"])
    out[name] = text.getvalue()
print(json.dumps([out, sorted(set({HEAVY!r}.split()) & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def helps():
    done = subprocess.run(
        [sys.executable, "-c", _ALL_HELP],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    texts, heavy = json.loads(done.stdout)
    assert heavy == []
    return texts


def test_help_shows_the_flags_that_the_parser_takes(helps):
    parsers = commands.parsers()
    assert set(helps) == set(parsers) and len(helps) == 35
    for name, parser in parsers.items():
        shown = set()
        body = helps[name].partition("Example:")[0].partition("\n\n")[2]
        for flag in re.findall(r"^  (?:-h, )?(--\S+)", body, re.MULTILINE):
            if flag.startswith("--[no-]"):
                shown |= {flag.replace("[no-]", ""), flag.replace("[no-]", "no-")}
            else:
                shown.add(flag)
        assert shown - {"--"} == set(parser.flags()) - {"-h"}, name


def test_help_is_complete_and_fits_80_columns(helps):
    for name, parser in commands.parsers().items():
        text = helps[name]
        assert text.startswith(f"usage: grain-jax {name}") and "\nExample:\n" in text
        body = text.partition("Example:")[0]
        wide = [line for line in body.splitlines() if len(line) > 80 and "  " not in line.strip()]
        assert not wide, (name, wide)
        for title, arguments in parser.arguments():
            for flag in arguments:
                assert flag.help, (name, title, flag)
                if flag.metavar and flag.name.startswith("--"):
                    assert re.match(r"--[a-zA-Z.-]+$", flag.name), (name, flag)


def test_every_command_is_listed_and_has_its_place():
    text = commands.help_text()
    for name, command in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE)
        module, _, function = command.main.partition(":")
        path = module.removeprefix("grain_jax.").replace(".", "/") + ".py"
        source = next(p for p in (ROOT / path, ROOT / "grain_jax" / path) if p.exists())
        assert f"\ndef {function}(" in source.read_text(), command


def test_the_example_of_each_help_parses():
    for name, parser in commands.parsers().items():
        for line in parser.example.replace("\\\n", " ").splitlines():
            words = line.split()
            assert words[:2] == ["grain-jax", name.split()[0]]
            commands._at(commands.COMMANDS[words[1]].parser)().parse_known_args(words[2:])


def test_all_switches_are_switches():
    """A boolean flag is the same everywhere: --x and --no-x."""
    for name, parser in commands.parsers().items():
        for action in parser._actions:
            if action.option_strings and action.nargs == 0:
                assert isinstance(action, Switch) or action.dest == "help", (name, action)


# What lists of choices outside of the light modules are.
def test_names_that_the_parsers_repeat():
    from grain_jax.data import sources
    from grain_jax.data.annotate import options, passes

    from grain_jax.convert import __main__ as convert

    assert tuple(sources.SOURCES) == options.SOURCES
    assert tuple(passes.PASSES) == options.PASSES
    assert sources.Options("").shard_size == options.SHARD_SIZE
    kinds = commands.parsers()["convert"].kinds
    assert set(convert.COMMANDS) == set(kinds)


def _typo(word, rng):
    """The word with one letter dropped, doubled, replaced, or two neighbours swapped."""
    place = rng.randrange(1, len(word) - 1)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    kind = rng.choice(("drop", "insert", "replace", "swap"))
    if kind == "swap":
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    middle = {"drop": "", "insert": letter + word[place], "replace": letter}[kind]
    return word[:place] + middle + word[place + 1 :]


def typos():
    """(words, what is suggested) of twenty typing errors: in commands, flags and config keys."""
    rng = random.Random(21)
    parsers = commands.parsers()
    keys = [
        key.name
        for key in listing.keys()
        if "[]" not in key.name
        and "options" not in key.name
        and len(key.name.rpartition(".")[2]) > 3
    ]
    found = []
    while len(found) < 20:
        kind = ("command", "flag", "key")[len(found) % 3]
        if kind == "command":
            name = rng.choice(list(commands.COMMANDS))
            word, right = [_typo(name, rng)], name
        elif kind == "flag":
            name = rng.choice([n for n in parsers if not parsers[n].kinds])
            right = rng.choice([f for f in parsers[name].flags() if len(f) > 5 and "." not in f])
            word = [*name.split(), "--" + _typo(right[2:], rng)]
        else:
            right = rng.choice(keys)
            group, _, leaf = right.rpartition(".")
            key = f"{group}.{_typo(leaf, rng)}".lstrip(".")
            word = ["train", "--workdir=x", "--config=demo", f"--config.{key}=1"]
        if word[-1].strip("-").split("=")[0].removeprefix("config.") != right.strip("-"):
            found.append((word, right))
    return found


@pytest.mark.parametrize("words, right", typos())
def test_twenty_typing_errors_each_get_one_line(words, right, capsys, monkeypatch):
    # The trainer itself would import JAX: its line is that of the loader of the config.
    monkeypatch.setitem(
        commands.COMMANDS, "train", commands.COMMANDS["train"]._replace(main=f"{__name__}:_load")
    )
    with pytest.raises(SystemExit) as end:
        commands.main(words)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert f"did you mean {right}?" in line


def _load(words):
    from grain_jax.cli import config_file, train

    args = train.parser().parse_args(words)
    config_file.load(args.config, args.overrides)


@pytest.mark.parametrize(
    "name, words, expected",
    [
        ("train", "--config demo --workdir x --process_id=1 --stall_seconds 9", {"process_id": 1}),
        ("train", "--config demo --print_shardings", {"print_shardings": True}),
        ("evaluate", "zeroshot --checkpoint a --images b --output c --process_id 1", {}),
        ("report", "a b --pictures 3 --no-model", {"workdir": ["a", "b"], "num_images": 3}),
        ("report", "--workdir a", {"workdir": ["a"]}),
        ("verify", "--workdir=a", {"workdir": "a"}),
        ("inspect", "a --pictures 3", {"set": "a", "num_images": 3}),
        ("convert", "to-torch --input a --output b", {"input": "a"}),
        ("convert", "from-hf --checkpoint a --output b", {"input": "a"}),
        ("plan", "--config demo --topology v5e:2x2 --json a --nosearch", {"output": "a"}),
        ("sweep", "--config demo --sweep a --workdir b --dry_run", {"dry_run": True}),
        ("annotate", "--images a --output b --records c --no-images", {"records": "c"}),
        ("annotate", "--images a --output b --no-images", {"keep_images": False}),
    ],
)
def test_older_spellings(name, words, expected):
    found = commands._at(commands.COMMANDS[name].parser)().parse_args(words.split())
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--config", "demo"], "grain-jax train: --workdir: missing; folder of the run"),
        (["train", "--workdir", "x"], "grain-jax train: --config: missing; a Python file with"),
        (["plan", "--config", "demo"], "grain-jax plan: --topology: missing; v5e:16x16"),
        (["local", "--processes", "2"], "grain-jax local: expected -- COMMAND"),
        (["export", "--checkpoint", "x"], "grain-jax export: --output DIR: missing; grain-jax"),
        (["trian"], "grain-jax trian: no such command; did you mean train?"),
        (["evaluate", "zreoshot"], "grain-jax evaluate: zreoshot: no such kind; did you mean zero"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(words)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith(message) and line.count("\n") == 1


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
