"""The images of a segmentation in the report."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest

from grain_jax.evaluate import segmentation
from grain_jax.report import collect, masks, page, regions, run_files
from tests.evaluate.test_segmentation import Coloured, folder
from tests.report import workdirs


@pytest.fixture
def data(tmp_path):
    return folder(tmp_path / "set", 10, (300, 100), names="wall\nfloor\n<i>sky\n")


def test_strips_have_the_image_the_truth_and_the_prediction(data):
    entry = segmentation.Segmentation(images=str(data))
    (data / "masks" / "0.png").unlink()
    found = masks.collect(Coloured(), entry)
    assert found["of"] == 10 and len(found["pictures"]) == 7
    assert [name for name, _ in found["classes"]] == ["wall", "floor", "<i>sky"]
    card = found["pictures"][0]
    assert card["name"] == "1.png" and card["right"] == pytest.approx(298 / 299)
    encoded = base64.b64decode(card["strip"].partition(",")[2])
    strip = np.asarray(PIL.Image.open(io.BytesIO(encoded))).astype(int)
    assert strip.shape == (75, 3 * 224 + 2 * 4, 3)
    palette = masks.colours(3).astype(int)
    near = lambda at, colour: np.abs(strip[40, at] - colour).max() < 12
    assert near(100, [2, 2, 2]) and near(228 + 100, palette[1]) and near(2 * 228 + 100, palette[1])
    html = masks.rendered("birds", found)
    assert html.count("<figure") == 7 and "&lt;i&gt;sky" in html and "<i>sky" not in html
    json.dumps(found)


def test_colours_differ():
    found = masks.colours(171).astype(int)
    assert len({tuple(x) for x in found.tolist()}) == 171
    apart = np.abs(found[1:] - found[:-1]).max(1)
    assert apart.min() > 40 and np.ptp(found, axis=1).min() > 40  # neighbours, and none is grey


def test_the_page_has_them_where_a_run_evaluates_a_segmentation(tmp_path, data, monkeypatch):
    workdirs.data(tmp_path / "data")
    workdirs.workdir(tmp_path / "run", tmp_path / "data")
    read = run_files.read(tmp_path / "run")
    none = page.render([read], [{"lines": {"model": "none"}}])
    assert 'id="segmentation"' not in none
    found = masks.collect(Coloured(), segmentation.Segmentation(images=str(data)))
    shown = page.render([read], [{"lines": {}, "segmentation": {"parts": found}}])
    assert 'id="segmentation"' in shown and shown.count("data:image/jpeg;base64,") >= 8
    entries = {"parts": {"kind": "segmentation", "images": str(data)}}
    monkeypatch.setattr(regions, "collect", lambda *_: {})
    looked = collect.collect(tmp_path / "run", {"evals": entries}, Coloured(), step=1)
    assert looked["lines"] == {} and len(looked["segmentation"]["parts"]["pictures"]) == 8
