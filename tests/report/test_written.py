"""What the text decoder writes, in the report."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest

from grain_jax.core import html
from grain_jax.report import collect, page, regions, run_files, written
from tests.evaluate.stub import annotate, number, region
from tests.evaluate.writer import Writer
from tests.report import workdirs


class Pointer(Writer):
    """Reads pictures where others read tokens, and points at the left half."""

    def caption(self, images):
        return super().caption([number(image) for image in images], beams=1)

    def point(self, images, texts):
        return [super(Pointer, self).point(image, own) for image, own in zip(images, texts)]

    def describe(self, images, boxes_xyxy):
        return super().describe([number(image) for image in images], boxes_xyxy, beams=1)


@pytest.fixture
def given(tmp_path):
    """30 images of 20 x 10 pixels, of which one is missing; entries of a run, the second with boxes."""
    left, right = region([0, 0, 10, 10], "a wing", 0.5), region([10, 0, 20, 10], "a <b>tail", 0.9)
    lines = [{"caption": f"bird {i}", "regions": [left, right]} for i in range(30)]
    annotate(tmp_path, [*lines, {"caption": "none"}])
    (tmp_path / "0.png").unlink()
    path = str(tmp_path / "A.jsonl")
    predictor = Pointer(
        captions={i: f"a bird {i} <i>" for i in range(30)},
        descriptions={i: ["", "a wing"] for i in range(30)},
    )
    absent = dict(kind="grounding", images="x", annotations="x.jsonl", missing="skip")
    said = dict(kind="captions", images=str(tmp_path), annotations=path)
    entries = {"absent": absent, "said": said}
    return predictor, entries


def test_pictures_have_texts_and_boxes(given):
    predictor, entries = given
    found = written.collect(predictor, entries)
    assert found["entry"] == "said" and found["of"] == 30 and len(found["pictures"]) == 23
    card = found["pictures"][0]
    assert card["name"] == "1.png" and card["caption"] == "a bird 1 <i>"
    assert card["reference"] == "bird 1"
    # Of the first box, that with the higher score, it says nothing; the left half is the other one's.
    assert card["boxes"] == [
        {"reference": "a <b>tail", "reads": "", "iou": 0.0},
        {"reference": "a wing", "reads": "a wing", "iou": 1.0},
    ]
    image = PIL.Image.open(io.BytesIO(base64.b64decode(card["picture"].partition(",")[2])))
    assert image.size == (60, 30)
    pixels = np.asarray(image).astype(int)
    colour = lambda i: np.array([int(html.REGION_COLOURS[i][k : k + 2], 16) for k in (1, 3, 5)])
    assert np.abs(pixels[15, 58] - colour(0)).max() < 60  # the annotated box on the right
    assert np.abs(pixels[15, 1] - colour(1)).max() < 60
    text = written.rendered("said", found)
    assert text.count("<figure") == 23 and "a bird 1 &lt;i&gt;" in text and "<i>" not in text
    assert "a &lt;b&gt;tail" in text and "points at IoU 1.00" in text and "(nothing)" in text
    json.dumps(found)


def test_without_boxes_there_is_a_line(given):
    with pytest.raises(regions.NoRegions, match="no entry of config.evals has annotated boxes"):
        written.collect(given[0], {"absent": given[1]["absent"]})


def test_the_page_has_them_where_the_model_has_a_text_decoder(given, tmp_path, monkeypatch):
    predictor, entries = given
    workdirs.data(tmp_path / "data")
    workdirs.workdir(tmp_path / "run", tmp_path / "data")
    read = run_files.read(tmp_path / "run")
    monkeypatch.setattr(regions, "collect", lambda *_: {})
    looked = collect.collect(tmp_path / "run", {"evals": entries}, predictor, step=1)
    assert looked["lines"] == {} and len(looked["written"]["pictures"]) == 23
    shown = page.render([read], [looked])
    assert 'id="written"' in shown and "Captions and pointing" in shown
    without = Pointer(has_text_decoder=False)
    looked = collect.collect(tmp_path / "run", {"evals": entries}, without, step=2)
    assert "written" not in looked and 'id="written"' not in page.render([read], [looked])
