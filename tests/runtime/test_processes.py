"""The same numbers on one device, on eight, and on two processes of four, of sets that nothing divides."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from grain_jax.checkpoint import saved_model
from grain_jax.core import errors
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import encode, tables, test_sets
from grain_jax.runtime import processes
from tests import perturbed, tiny
from tests.paths import ROOT

pytestmark = pytest.mark.long

CLASSES = ("cat", "dog", "red_fox")


@pytest.fixture(scope="module")
def model():
    config = tiny.config(**tiny.SHALLOW).model
    return config, perturbed.params(config)


def _write_pictures(folder, counts):
    rng = np.random.default_rng(0)
    paths = []
    for name, count in zip(CLASSES, counts):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            # One colour and some noise: a random tower tells these apart.
            pixels = rng.integers(0, 256, 3) * 0.8 + rng.integers(0, 50, (9, 7, 3))
            paths.append(folder / name / f"{i:03d}.png")
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
    return paths


def test_two_processes_give_what_one_gives(model, tmp_path):
    paths = _write_pictures(tmp_path / "classes", (5, 4, 4))
    paths[6].write_bytes(b"no picture")  # 12 are left
    saved_model.save_model(tmp_path / "model", *model)
    described = {name.replace("_", " "): [f"{name} parts", "a tail"] for name in CLASSES}
    (tmp_path / "D.json").write_text(json.dumps(described))
    with (tmp_path / "A.jsonl").open("w") as file:
        for i, path in enumerate(paths):
            region = {"box": [0, 0, 2 + i % 5, 9], "description": f"part {i % 3}", "score": 1}
            line = {"image": f"{path.parent.name}/{path.name}", "caption": f"image {i}"}
            file.write(json.dumps(line | {"regions": [region]}) + "\n")
    arguments = ["suite", "--checkpoint", str(tmp_path / "model"), "--batch-size=4"]
    arguments += [f"--config={ROOT}/tests/evaluate/suite_config.py:{tmp_path}", "--output"]
    assert command.main([*arguments, str(tmp_path / "1.json")]) == 0
    two = [sys.executable, "-m", "grain_jax.launch.local", "--processes=2"]
    two += ["--devices-per-process=4", "--"]
    two += [sys.executable, "-m", "grain_jax.evaluate", *arguments, str(tmp_path / "2.json")]
    done = subprocess.run(two, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2)]
    one, both = results
    assert (one["processes"], both["processes"]) == (1, 2) and one["digest"] == both["digest"]
    assert list(both["ran"]) == ["classes", "grounding", "probe", "retrieval"]
    assert both["ran"]["classes"]["images"] == 12 == both["ran"]["grounding"]["images"]
    unread = [r["ran"]["classes"]["unreadable_images"] for r in results]
    assert unread[0] == unread[1]
    absent = {"absent": f"{tmp_path}/absent: not there; to get it: ask"}
    assert both["skipped"] == one["skipped"] == absent
    for name in one["ran"]:  # all that was measured, without times
        numbers = [tables.scalars(r["ran"][name]) | {"seconds": 0} for r in results]
        assert numbers[1] == pytest.approx(numbers[0], abs=1e-6), name
    for part in ("", "by_name"):
        found = [r["ran"]["classes"].get(part, r["ran"]["classes"])["alpha_0.5"] for r in results]
        assert found[0]["per_class"] == found[1]["per_class"]
    probes = [r["ran"]["probe"] for r in results]
    assert probes[0]["images"] + probes[0]["train_images"] == 12
    assert probes[0]["top1"] == probes[1]["top1"] and probes[0]["C"] == probes[1]["C"]
    lines = done.stderr.splitlines()  # launch.local's; one process speaks
    assert len([line for line in lines if line.startswith("[0] classes ")]) == 2
    assert not any("classes" in line or "skipped" in line for line in lines if "[1]" in line)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 50])
def test_shares_are_stretches_that_make_the_whole(monkeypatch, count):
    positions = []
    for index in range(8):
        monkeypatch.setattr(processes, "process_info", lambda i=index: (i, 8))
        positions += processes.share(count)
        assert len(processes.share(count)) in (count // 8, count // 8 + 1)
    assert positions == list(range(count))


def _peer(monkeypatch, *theirs):
    """What another process would send, in the place of a collective."""
    monkeypatch.setattr(processes, "process_info", lambda: (0, 2))
    given = iter(theirs)
    monkeypatch.setattr(processes, "_of_all", lambda content: [content, next(given)])


def test_where_one_process_fails_all_do(monkeypatch, capsys):
    _peer(monkeypatch, json.dumps(["no such folder", None]).encode())
    with pytest.raises(processes.Failed, match="process 1: no such folder"):
        processes.run_together(lambda: 5)
    _peer(monkeypatch, json.dumps([None, None]).encode())
    with pytest.raises(processes.Failed, match="process 0: ZeroDivisionError: division by zero"):
        processes.run_together(lambda: 1 / 0)
    assert "ZeroDivisionError" in capsys.readouterr().err  # with its traceback
    _peer(monkeypatch, json.dumps([None, None]).encode())
    with pytest.raises(errors.UserError, match="^mine$"):
        processes.agree(errors.UserError("mine"))


def test_processes_that_see_other_files_are_an_error(monkeypatch, tmp_path):
    paths = _write_pictures(tmp_path, (2, 2, 2))
    from tests.evaluate.stub import StubPredictor

    class Any(StubPredictor):
        def encode_image(self, pictures):
            return np.ones((len(pictures), 2), np.float32)

    _peer(monkeypatch, json.dumps([None, [3, {}, 5]]).encode())
    with pytest.raises(test_sets.InputError, match="found 6, 5 images, expected the same files"):
        encode.gather_images(Any(), paths, label="x")
