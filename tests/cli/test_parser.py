"""The parser of the commands: spellings, switches, suggestions; wrong usage is one line."""

import pytest

from grain_jax import errors
from grain_jax.cli.config_parser import ConfigParser
from grain_jax.cli.parser import KindsParser, Parser
from grain_jax.cli.values import number, positive, share


def _parser():
    out = Parser("grain-jax x", "does x", example="grain-jax x --output y")
    add = out.add_argument_group("what").add_argument
    add("--output", required=True, metavar="DIR", help="folder")
    add("--batch-size", type=positive, default=8, help="images at a time")
    add("--share", type=share, help="of them")
    add("--rate", type=number(float, -1, 1), help="a rate")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of it")
    add("--files", nargs="+", default=[], metavar="FILE", help="files")
    out.switch("--again", help="again")
    out.switch("--model", default=True, help="with it")
    out.older(out="--output", no_network="--no-model")
    return out


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--output y", {"output": "y", "batch_size": 8, "again": False, "model": True}),
        ("--output=y --batch-size=4", {"output": "y", "batch_size": 4}),
        ("--output y --batch_size 4", {"batch_size": 4}),
        ("-output y -batch_size=4 -again", {"batch_size": 4, "again": True}),
        ("--out y --no_network", {"output": "y", "model": False}),
        ("--output y --no-model --again", {"again": True, "model": False}),
        ("--output y --nomodel --noagain", {"again": False, "model": False}),
        ("--output y --again=true --model=false", {"again": True, "model": False}),
        ("--output y --no-again=false", {"again": True}),
        ("--output y --rate -0.5", {"rate": -0.5}),
        ("--output -y", {"output": "-y"}),
        ("--output=--y", {"output": "--y"}),
        ("--output y --files a b --again", {"files": ["a", "b"], "again": True}),
    ],
)
def test_every_spelling_of_a_flag(words, expected):
    found = vars(_parser().parse_args(words.split()))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--output DIR: missing; grain-jax x --help says what it is"),
        ("--outptu y", "--outptu: no such flag; did you mean --output?"),
        ("--output y --agian", "--agian: no such flag; did you mean --again?"),
        ("--output y --zzz", "--zzz: no such flag; grain-jax x --help lists them"),
        ("--output", "--output: has no value; expected --output DIR, or --output=VALUE where"),
        ("--output --again", "--output: has no value, but the flag --again after it; expected"),
        ("--output -again", "--output: has no value, but the flag --again after it; expected"),
        ("--output y --batch-size 0", "--batch-size: got '0', expected a whole number in 1.."),
        ("--output y --share 2", "--share: got '2', expected a share from 0 to 1"),
        ("--output y --rate x", "--rate: got 'x', expected a number in -1..1"),
        (
            "--output y --dtype flaot32",
            "--dtype: got 'flaot32', expected one of float32, bfloat16; did you mean float32?",
        ),
        ("--output y --again=maybe", "--again: got 'maybe', expected true or false, or --again"),
        ("--output y z", "z: expected a flag; grain-jax x --help lists them"),
    ],
)
def test_wrong_usage_is_a_fault_of_the_user_in_one_line(words, message):
    with pytest.raises(errors.UserError) as caught:
        _parser().parse_args(words.split())
    assert str(caught.value).startswith(f"grain-jax x: {message}")
    assert "\n" not in str(caught.value) and caught.value.status == 2


def test_flags_that_go_to_another_program():
    parser = _parser()
    parser.pass_on_unknown()
    found, rest = parser.parse_known_args(["--output=y", "--runner=Direct", "--num_workers=2"])
    assert (found.output, rest) == ("y", ["--runner=Direct", "--num_workers=2"])
    with pytest.raises(errors.UserError, match="--batchsize: no such flag; did you mean --batch-s"):
        parser.parse_known_args(["--output=y", "--batchsize=2"])


def test_kinds_have_flags_of_their_own():
    first, second = (Parser(f"grain-jax x {name}", f"is {name}") for name in ("one", "two"))
    second.add_argument("--depth", type=positive, help="how deep")
    parser = KindsParser("grain-jax train", [first, second])
    found = parser.parse_args(["two", "--depth", "3"])
    assert (found.command, found.depth) == ("two", 3)
    assert parser.parse_args(["--depth=3", "two"]).depth == 3  # the kind may stand elsewhere
    assert "  two  is two\n" in parser.format_help()
    for words, message in (
        (["tow"], "grain-jax train: tow: no such kind; did you mean two?"),
        ([], "grain-jax train: expected a kind first: one, two"),
        (["one", "--depth=3"], "grain-jax x one: --depth: no such flag"),
    ):
        with pytest.raises(errors.UserError) as caught:
            parser.parse_args(words)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "words, overrides",
    [
        ("--config.a.b=1 --config demo", ["--config.a.b=1"]),
        ("--config=demo --config.a.b 1 -config.c_d=x", ["--config.a.b=1", "--config.c_d=x"]),
        ("--config demo --config.a --noconfig.b", ["--config.a", "--config.b=false"]),
    ],
)
def test_the_keys_of_a_config_are_taken_out(words, overrides):
    parser = ConfigParser("grain-jax train")
    parser.add_config(parser.add_argument_group("run"))
    found = parser.parse_args(words.split())
    assert (found.config, found.overrides) == ("demo", overrides)


def test_a_key_of_the_config_is_no_value():
    parser = ConfigParser("grain-jax train")
    group = parser.add_argument_group("run")
    parser.add_config(group)
    group.add_argument("--workdir", help="folder")
    for words in (["-workdir", "-config.a=3"], ["--workdir", "--config.a=3"]):
        with pytest.raises(errors.UserError, match="has no value, but the flag --config.a=3 after"):
            parser.parse_args(words)


def test_a_misspelt_config_flag():
    parser = ConfigParser("grain-jax train")
    parser.add_config(parser.add_argument_group("run"))
    for word, near in (("--confg.a.b=1", "--config.a.b"), ("--cnfig", "--config")):
        with pytest.raises(errors.UserError, match=rf"did you mean {near}\?"):
            parser.parse_args([word, "x"])
