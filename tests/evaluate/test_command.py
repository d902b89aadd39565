import json
import re

import numpy as np
import pytest

from grain_jax import inference
from grain_jax.evaluate import __main__ as command
from tests.evaluate.stub import StubPredictor, write_lines, write_picture

TEXTS = {"a cat": [1, 0], "a dog": [0, 1], "whiskers": [1, 0], "a tail": [0, 1]}
TEXTS |= {"a cat, which has whiskers": [1, 0], "a dog, which is a tail": [0, 1]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Class folders, descriptions and annotations, and a stub in place of any checkpoint."""
    regions = {}
    for i, name in enumerate(("cat", "dog")):
        write_picture(tmp_path / "classes" / name / f"{i}.png", i)
        regions[i] = ([[0, 0, 1, 0.5], [0, 0, 0.1, 0.1]], [np.eye(2)[i], [1, 1]])
    (tmp_path / "templates.txt").write_text("a {}\n")
    (tmp_path / "D.json").write_text(json.dumps({"cat": ["whiskers"], "dog": ["a tail"]}))
    lines = [{"image": f"{name}/{i}.png", "caption": f"a {name}"} for i, name in enumerate(("cat", "dog"))]
    write_lines(tmp_path / "A.jsonl", lines)
    predictor = StubPredictor({0: [1, 0], 1: [0, 1]}, TEXTS, regions)
    monkeypatch.setattr(inference, "load", lambda path, **_: predictor)
    monkeypatch.setattr(command.saved_model, "find", lambda path: path)
    return tmp_path


def _run(folder, *arguments):
    output = folder / "new" / "out.json"
    where = ["--checkpoint", "RUN", "--images", str(folder / "classes"), "--output", str(output)]
    return command.main([*arguments, *where]), output


def test_zeroshot(folder, capsys):
    arguments = ["zeroshot", "--templates", str(folder / "templates.txt")]
    status, output = _run(folder, *arguments)
    result = json.loads(output.read_text())
    assert status == 0
    assert result["kind"] == "zeroshot" and result["checkpoint"] == "RUN"
    assert result["top1"] == 1.0 == result["alpha_1.0"]["top1"] and result["alpha"] == 1.0
    assert result["chance"] == 0.5 and result["top1_low"] == pytest.approx(0.342, abs=1e-3)
    table = capsys.readouterr().out
    assert "zeroshot: alpha_1.0/top1 100.0% 34.2 - 100.0% 50.0% 2\n" in re.sub(" +", " ", table)
    # Several alphas.
    arguments += ["--descriptions", str(folder / "D.json"), "--alpha", "0.5,0", "--alpha", "0.5"]
    assert _run(folder, *arguments, "--no-names")[0] == 0
    result = json.loads(output.read_text())
    assert result["alpha"] == 0.5 and result["names"] is False
    assert [key for key in result if key.startswith("alpha_")] == ["alpha_0.5", "alpha_0.0"]


def test_what_cannot_be_saved_is_shown(folder, capsys, monkeypatch):
    def write_bytes(self, content):
        if content:  # the disk became full while it measured
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.epath.Path("x").__class__, "write_bytes", write_bytes)
    status, output = _run(folder, "retrieval", "--annotations", str(folder / "A.jsonl"))
    out, err = capsys.readouterr()
    assert status == 2 and "retrieval: image_to_text/r1" in out
    assert err == f"--output: {output}: No space left on device; nothing was saved\n"


FAULTS = {
    "": "expected a kind first: zeroshot, linear-probe, retrieval, grounding, boxes",
    "zeroshot --checkpoint x": "--images DIR, --output OUT.json: missing",
    "zeroshot --alpha half": "got 'half', expected numbers with commas between",
    "zeroshot --alpha 0.5 {rest}": "expected a file (D.json) for alpha 0.5",
    "grounding --annotations no.jsonl {rest}": "no.jsonl: no such file",
}


@pytest.mark.parametrize("arguments", FAULTS)
def test_faults_are_one_line(folder, capsys, arguments):
    rest = f"--checkpoint x --images {folder / 'classes'} --output {folder / 'o'}"
    assert command.main(arguments.format(rest=rest).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and FAULTS[arguments] in err
    assert not (folder / "o").exists()
