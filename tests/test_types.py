"""Outside the checkout a type checker finds the package, and its calls have the types that users expect."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import pathlib

import numpy as np
import PIL.Image

import grain_jax
from grain_jax.data.aviary.samples import birds

model = grain_jax.load("aviary-tiny", dtype="float32")
image, path = PIL.Image.new("RGB", (64, 64)), pathlib.Path("a.jpg")
one: np.ndarray = model.encode_image(path)
many: np.ndarray = model.encode_image([image, "b.jpg", np.zeros((4, 4, 3), np.uint8)])
regions = model.encode_regions([image])
embeds: np.ndarray = model.encode_boxes(image, [[0, 0, 1, 1]])
lists: list[np.ndarray] = model.encode_boxes([image], [[[0, 0, 1, 1]]])
boxed: np.ndarray = model.classify_boxes(path, [[0, 0, 1, 1]], ["a"])
box: np.ndarray = model.ground(image, "a beak").box_xyxy
scores: list[float] = [each.score for each in model.ground(path, ["a beak", "a tail"])]
found: tuple[str, ...] = model.detect(image, ["a beak"], threshold=0.5).texts
boxes: list[np.ndarray] = [x.boxes_xyxy for x in model.detect([image], ["a beak"])]
labels: np.ndarray = model.segment(image, ["bird", "sky"])
all_labels: list[np.ndarray] = model.segment([image], ["bird", "sky"])
likely: np.ndarray = model.present([image], ["a beak"])
maps: np.ndarray = model.similarity_map(image, ["a beak"])
zero: np.ndarray = model.classify([b.image for b in birds(2)], {"wren": ["a tail"]}, alpha=0.5)
model.warm_up()
"""


@pytest.mark.long
def test_a_script_in_an_empty_folder_has_types(tmp_path):
    (tmp_path / "use.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT.replace("box: np.ndarray =", "box: str ="))  # not Any
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    faults = json.loads(done.stdout)["generalDiagnostics"]
    found = [(pathlib.Path(x["file"]).name, x.get("rule")) for x in faults]
    assert found == [("wrong.py", "reportAssignmentType")], done.stdout
