"""A disk that takes no more is one line that names the path, and status 1, in whatever command.

The limit of a file's size (`ulimit -f`) stands for the disk: only root can mount a small one.
"""

import contextlib
import re
import resource

import numpy as np
import pytest
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.cli import process
from grain_jax.convert import __main__ as convert
from grain_jax.convert import output
from grain_jax.core import errors
from grain_jax.data import build
from grain_jax.data.annotate import __main__ as annotate
from tests import record_sets, tiny
from tests.checkpoint import test_states
from tests.hostile import cases


@contextlib.contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def data(main, *flags):
    """A command that reads A.jsonl."""

    def run(folder):
        record_sets.write_annotations(folder / "in", 12, size=(40, 30))
        words = [f"--annotations={folder / 'in/A.jsonl'}", f"--images={folder / 'in'}"]
        return main, [*words, f"--output={folder / 'out'}", *flags]

    return run


def pack(folder):
    """What every conversion does with its model, as the command of one."""
    params = {str(i): np.random.default_rng(i).random(4000) for i in range(9)}

    def main(words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(convert.COMMANDS, "pack", write)
            return convert.main(words)

    def write(_):
        with output.replacing(epath.Path(folder / "out")) as new:
            saved_model.save_model(new, config_lib.Model(), params)

    words = ["pack", "--checkpoint=a", f"--output={folder / 'out'}"]
    return main, words


def train(folder):
    """Saves by a run."""

    def main(_):
        with errors.storage_faults_as_one_line(folder / "out"):
            test_states.save_steps(folder / "out", range(1, 5), tiny.config(), width=256)

    return main, []


LINES = ("--source=annotations",)
COMMANDS = {  # name -> command, bytes of the largest file, the file that is named
    "a part of build": (data(build.main, "--name=x"), 3000, ""),
    "a shard of annotate": (data(annotate.main, *LINES, "--passes=negatives"), 3000, "/annotations/.*"),
    "lines of annotate": (data(annotate.main, *LINES, "--passes=none", "--shard-size=4"), 3000, ""),
    "pack": (pack, 20_000, ""),
    "train": (train, 20_000, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_a_line_with_the_path(name, tmp_path, caplog):
    command, size, file = COMMANDS[name]
    main, words = command(tmp_path)
    with largest_file(size):
        outcome = cases.run(lambda words: process.run(main, words), words)
    named = f"^{re.escape(str(tmp_path / 'out'))}{file}: File too large; raise the largest size"
    cases.check(outcome, named, 1)
    lines = [x for x in outcome.err.splitlines() if "lines faulty" not in x]
    assert len(lines) == 1
    assert not caplog.records
