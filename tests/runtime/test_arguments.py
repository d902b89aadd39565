"""The parser of the commands without a config: wrong usage is one line, and nothing heavy is imported."""

import subprocess
import sys

import pytest

from grain_jax import errors
from grain_jax.runtime.arguments import Parser


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "x: the following arguments are required: --output; --help lists the arguments"),
        (["--out", "y"], "x: the following arguments are required: --output"),
        (["--output", "y", "--colour", "red"], "x: unrecognized arguments: --colour red"),
    ],
)
def test_wrong_usage_is_a_fault_of_the_user_in_one_line(arguments, message):
    parser = Parser("x")
    parser.add_argument("--output", required=True)
    with pytest.raises(errors.UserError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert caught.value.status == 2


def test_it_is_light():
    code = (
        "import sys, grain_jax.runtime.arguments; print({'jax', 'absl', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
