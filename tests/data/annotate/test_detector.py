"""The detector: where boxes come back, which description each gets, what is merged, clipped and isolated."""

import pathlib
import types

import numpy as np
import PIL.Image
import pytest

from grain_jax.data.annotate import detector, local_models
from grain_jax.data.annotate.arguments import Annotate
from tests.data.annotate import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint."""
    return models.owlv2(tmp_path_factory.mktemp("owlv2"))


def load(name, **given):
    return detector.Detector(Annotate(images="", output="", detector=str(name), **given))


def _noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(600, 230), (230, 600), (2100, 805), (767, 767)])
def test_a_box_comes_back_within_a_pixel_from_any_shape_of_picture(folder, monkeypatch, size):
    monkeypatch.setattr(detector, "MERGE_IOU", 1.0)
    finder = load(folder, threshold=0.0)
    # Without what it learns, the network's boxes are a grid of 6 x 6 over the padded square: sides of a
    # sixth, centres at the end of each sixth. The last centres lie on the edge.
    finder._model.box_head.dense2.weight.data.zero_()
    finder._model.box_head.dense2.bias.data.zero_()
    (regions,) = finder.detect([_noise(*size)], [["a beak"]])
    unit = max(size) / 6
    inner = [x.box_xyxy for x in regions if max(x.box_xyxy[:2]) < 5 * unit]
    columns, rows = (
        [(unit * (i + 0.5), min(unit * (i + 1.5), side)) for i in range(5) if unit * (i + 1) < side]
        for side in size
    )
    expected = [(x1, y1, x2, y2) for x1, x2 in columns for y1, y2 in rows]
    np.testing.assert_allclose(sorted(inner, key=lambda b: np.round(b, -1).tolist()), expected, atol=1)


def test_pictures_in_a_batch_do_not_disturb_each_other(folder, caplog):
    single, many = (load(folder, threshold=0.1, batch_size=size) for size in (1, 8))
    pictures = [_noise(90, 64, seed=i) for i in range(3)]
    texts = [["a beak", "two red wings"], ["a"], ["a beak " * 200, "what? 3.5 cm.", "<|endoftext|>", "喙"]]
    alone, together = single.detect(pictures, texts), many.detect(pictures, texts)
    assert not caplog.records  # the batch did not fall apart
    for a, b, wanted in zip(alone, together, texts):
        assert [x.description for x in a] == [x.description for x in b]
        assert {x.description for x in a} <= set(wanted)
        if len(wanted) > 1:
            assert len(a) > 2
            scores = [x.score for x in a]
            assert scores == sorted(scores, reverse=True) and 0.1 < scores[-1] <= scores[0] <= 1
            boxes_xyxy = np.array([x.box_xyxy for x in a])
            assert boxes_xyxy.min() >= 0 and (boxes_xyxy <= [90, 64, 90, 64]).all()
            assert (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= 1).all()
            np.testing.assert_allclose(boxes_xyxy, [x.box_xyxy for x in b], atol=0.01, rtol=0)
            np.testing.assert_allclose(scores, [x.score for x in b], atol=1e-4)


def test_boxes_are_clipped_and_overlapping_ones_of_a_description_merge():
    entries = [
        (0.5, [12, 10, 52, 50], "a beak"),  # IoU 0.905 with the better one
        (0.9, [10, 10, 50, 50], "a beak"),
        (0.4, [12, 10, 52, 50], "a tail"),  # another description's
        (0.3, [60, 60, 90, 90], "a beak"),
        (0.2, [10, 10, 90, 30], "a beak"),  # IoU 0.333
        (0.8, [-10, 20, 50, 110], "over the edge"),
        (0.8, [80, 80, 140, 90], "most of it outside"),
        (0.7, [120, 120, 150, 150], "outside"),
        (0.6, [30, 30, 30.5, 60], "a line"),
        (0.5, [40, 40, 30, 60], "inverted"),
    ]
    kept = detector.merged(entries, 100, 100)
    assert [(x.score, x.description) for x in kept] == [
        (0.9, "a beak"),
        (0.8, "over the edge"),
        (0.4, "a tail"),
        (0.3, "a beak"),
        (0.2, "a beak"),
    ]
    assert kept[1].box_xyxy == (0, 20, 50, 100)


def test_a_model_in_an_object_store_is_loaded_too(folder, monkeypatch):
    store = str(pathlib.Path(folder).parent)
    path = lambda name: pathlib.Path(name.replace("gs://bucket", store))
    monkeypatch.setattr(local_models, "epath", types.SimpleNamespace(Path=path))
    finder = load(f"gs://bucket/{pathlib.Path(folder).name}", threshold=0.0)
    assert finder.detect([_noise(64, 64)], [["a beak"]])[0]
