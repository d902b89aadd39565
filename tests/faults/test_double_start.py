"""Two trainers started on one workdir at the same moment: one trains, one is refused, nothing is lost."""

import subprocess

import pytest

from tests import runs
from tests.paths import ROOT

pytestmark = pytest.mark.slow


def _start(workdir, folder):
    command = runs.command(workdir, {"total_steps": 30, **runs.SMALL})
    environment = runs.on_one_device(folder / "compiled")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that was left alone."""
    folder = tmp_path_factory.mktemp("double")
    alone = _start(folder / "alone", folder)
    said = alone.communicate()[1]
    assert alone.returncode == 0, said
    return folder


@pytest.mark.parametrize("number", range(4))
def test_of_two_at_once_one_trains_as_if_alone(folder, number):
    workdir = folder / str(number)
    pair = [_start(workdir, folder) for _ in range(2)]
    said = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2], "\n".join(said)
    refused, first = sorted(pair, key=lambda process: -process.returncode)
    line = said[pair.index(refused)].strip()
    assert line.startswith(f"{workdir}: process {first.pid} on ") and "\n" not in line
    assert runs.lines(workdir) == runs.lines(folder / "alone")
    saved = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert saved == ["28", "30"] and not (workdir / "trainer.lock").exists()
