"""The parser of the commands: spellings, switches, suggestions; wrong usage is one line."""

import pytest

from grain_jax.cli.flags import flag, many, share
from grain_jax.cli.parser import Command, Configured, Parser
from grain_jax.core import errors

pytestmark = pytest.mark.quick


class X(Command, name="x"):
    """Does x.

    Example:
      grain-jax x --output y

    what:
      --output DIR                folder
      --batch-size N              images at a time
      --share SHARE               of them
      --rate R                    a rate
      --dtype float32|bfloat16    of it
      --files FILE [FILE ...]     files
      --[no-]again                again
      --[no-]model                with it
    """

    output: str = flag(also="out")
    batch_size: int = 8
    share: float = share(0.5)
    rate: float = flag(0.0, low=-1, high=1)
    dtype: str = flag("float32", choices=("float32", "bfloat16"))
    files: list[str] = many()
    again: bool = False
    model: bool = True


class Passing(X, name="x"):
    """Passes flags on."""

    others: list[str] = many()


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--output y", {"output": "y", "batch_size": 8, "again": False, "model": True}),
        ("--output=y --batch-size=4", {"output": "y", "batch_size": 4}),
        ("--output y --batch_size 4", {"batch_size": 4}),
        ("--out y", {"output": "y"}),
        ("--output y --no-model --again", {"again": True, "model": False}),
        ("--output y --again=true --model=false", {"again": True, "model": False}),
        ("--output y --rate -0.5", {"rate": -0.5}),
        ("--output y --files a b --again", {"files": ["a", "b"], "again": True}),
    ],
)
def test_every_spelling_of_a_flag(line, expected):
    args = vars(X.parse(line.split()))
    assert {name: args[name] for name in expected} == expected


FAULTS = [
    ("", "--output DIR: missing; folder"),
    ("--outptu y", "--outptu: no such flag; did you mean --output?"),
    ("--output --again", "--output: has no value, but the flag --again after it; expected"),
    ("--output y --batch-size 0", "--batch-size: got '0', expected a whole number in 1.."),
    (
        "--output y --dtype flaot32",
        "--dtype: got 'flaot32', expected one of float32, bfloat16; did you mean float32?",
    ),
    ("--output y --again=maybe", "--again: got 'maybe', expected true or false, or --again"),
    ("--output y z", "z: expected a flag; grain-jax x --help lists them"),
]


@pytest.mark.parametrize("line, message", FAULTS)
def test_wrong_usage_is_a_fault_of_the_user_in_one_line(line, message):
    with pytest.raises(errors.UserError) as caught:
        X.parse(line.split())
    assert str(caught.value).startswith(f"grain-jax x: {message}")
    assert "\n" not in str(caught.value) and caught.value.status == 2


def test_flags_that_go_to_another_program():
    args = Passing.parse(["--output=y", "--runner", "Direct", "--num_workers=2"])
    assert (args.output, args.others) == ("y", ["--runner", "Direct", "--num_workers=2"])
    with pytest.raises(errors.UserError, match="--batchsize: no such flag; did you mean --batch-s"):
        Passing.parse(["--output=y", "--batchsize=2"])


class One(Command, name="k one"):
    """Is one."""


class Two(Command, name="k two"):
    """Is two.

    what:
      --depth N              how deep
      --name NAME            its name
      --files FILE [FILE ...]  its files
      --[no-]again           again
    """

    depth: int | None = None
    name: str = ""
    files: list[str] = many()
    again: bool = False


class Kinds(Command, name="k", kinds={"one": One, "two": Two}):
    """Has kinds."""


def test_kinds_have_flags_of_their_own():
    args = Kinds.parse(["two", "--depth", "3"])
    assert isinstance(args, Two) and (args.command, args.depth) == ("two", 3)
    assert "  two  Is two\n" in Parser(Kinds).format_help()
    for line, message in (
        (["tow"], "grain-jax k: tow: no such kind; did you mean two?"),
        (["one", "--depth=3"], "grain-jax k one: --depth: no such flag"),
        (["--name", "two"], "grain-jax k: expected a kind first: one, two"),
        ([], "grain-jax k: expected a kind first: one, two"),
        (["two", "--nmae", "one"], "grain-jax k two: --nmae: no such flag; did you mean --name?"),
    ):
        with pytest.raises(errors.UserError) as caught:
            Kinds.parse(line)
        assert str(caught.value).startswith(message)


class Run(Configured, name="run"):
    """Runs.

    the run:
      --workdir DIR  folder
    """

    workdir: str | None = None


@pytest.mark.parametrize(
    "line, overrides",
    [
        ("--config=demo --config.a.b 1 --config.c_d=x", ["--config.a.b=1", "--config.c_d=x"]),
        ("--config demo --config.a", ["--config.a"]),
    ],
)
def test_the_keys_of_a_config_are_taken_out(line, overrides):
    args = Run.parse(line.split())
    assert (args.config, args.overrides) == ("demo", overrides)
