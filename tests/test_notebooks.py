"""The notebooks of docs/notebooks run from start to end, and are committed with small outputs of such a run.

`jupyter execute --inplace docs/notebooks/*.ipynb`, in an environment with grain_jax, renews the outputs.
"""

import os
import re
import sys

import nbclient
import nbformat
import pytest

from tests.paths import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def printed(notebook) -> str:
    """All text that its cells give."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    data = [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join([output.get("text", "") for output in outputs] + data)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder, with the command grain-jax of this checkout."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "grain-jax").write_text(f'#!/bin/sh\nexec {sys.executable} -m grain_jax "$@"\n')
    (tmp_path / "bin" / "grain-jax").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # conftest.py's make 8 devices, and slow steps

    def run(name):
        notebook, place = read(name), {"metadata": {"path": tmp_path}}
        return nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources=place
        ).execute()

    return run


@pytest.mark.slow
def test_from_nothing_to_a_trained_model(run):
    text = printed(run("aviary"))
    accuracy = {m[1]: int(m[2]) for m in re.finditer(r"^(this run|aviary-tiny) +(\d+)% of 60", text, re.M)}
    assert accuracy["this run"] > 30 and accuracy["aviary-tiny"] >= 90, text


@pytest.mark.slow
def test_a_checkpoint_to_torch_to_onnx_and_back(run):
    text = printed(run("convert"))
    assert text.count("parity: PROVEN") == 3 and "arrays, all equal" in text, text
    assert float(re.search(r"scores differ by at most (\S+)", text)[1]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_with_the_outputs_of_one_run(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000
    assert "/tmp/" not in (FOLDER / f"{name}.ipynb").read_text()
