"""The detector: where boxes come back, which description each gets, what is merged, clipped and isolated."""

import pathlib

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from grain_jax.data.annotate import detector, local_models
from grain_jax.data.annotate.arguments import Annotate
from tests.data.annotate import models

# Width x height of the images, 1:10 to 10:1, most of them odd; the last is shrunk before it is shown.
SIZES = [(53, 530), (121, 601), (767, 767), (641, 479), (1009, 143), (4109, 411)]
# Red tells them apart; padding is black, as the ground's red.
GROUND, OBJECT = (0, 120, 160), (255, 40, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint."""
    return models.owlv2(tmp_path_factory.mktemp("owlv2"))


def load(name, **given):
    return detector.Detector(Annotate(images="", output="", detector=str(name), **given))


def _picture(width, height):
    """An image, and the box of the one thing in it."""
    box = (width // 7, height // 3, width - width // 5, height - height // 4)
    picture = PIL.Image.new("RGB", (width, height), GROUND)
    picture.paste(OBJECT, box)
    return picture, box


def _noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def _extent(covered):
    """Centre and length of the covered stretch of a line, in shares of it: a blurred edge counts as it covers."""
    positions = torch.arange(len(covered)) + 0.5
    length = covered.sum()
    return (covered * positions).sum() / length / len(covered), length / len(covered)


def _share(pixels):
    """The object's box in pixels as a network is shown them, in shares of their width and height, cxcywh."""
    red = pixels[0]
    covered = (red - red.min()) / (red.max() - red.min())
    cx, w = _extent(covered[covered.sum(dim=1).argmax()])
    cy, h = _extent(covered[:, covered.sum(dim=0).argmax()])
    return torch.stack([cx, cy, w, h])


def _seeing(config):
    """A network that sees the object, and gives its box in shares of all that it is shown, padding included."""
    output = transformers.utils.ModelOutput

    def run(*, pixel_values, input_ids, **_):
        boxes = torch.full((len(pixel_values), 2, 4), 0.5)  # the second box has a low score
        for index, pixels in enumerate(pixel_values):
            boxes[index, 0] = _share(pixels)
        tokens = input_ids.view(len(pixel_values), -1, input_ids.shape[1])
        logits = torch.full((len(pixel_values), 2, tokens.shape[1]), -9.0)
        logits[:, 0, 1] = 2.0
        fill = tokens[:, :, 1] == tokens.max()  # a start and an end, nothing between
        logits[:, 0][fill] = 5.0
        return output(logits=logits, pred_boxes=boxes)

    run.config = config
    return run


def test_a_box_comes_back_within_a_pixel_from_any_shape_of_picture(tmp_path, caplog):
    seeing = load(models.owlv2(tmp_path, size=960), batch_size=4)  # as the published processor
    seeing._model = _seeing(seeing._model.config)
    pictures, boxes = zip(*(_picture(*size) for size in SIZES))
    texts = [["a blue sky", "a red block. why?", *["more"] * (i % 3)] for i in range(len(SIZES))]
    results = seeing.detect(pictures, texts)
    assert not caplog.records  # no batch failed
    errors = {}
    for size, box, regions in zip(SIZES, boxes, results, strict=True):
        (region,) = regions
        assert region.description == "a red block. why?"
        assert region.score == pytest.approx(1 / (1 + np.exp(-2.0)))
        errors[size] = np.abs(np.subtract(region.box_xyxy, box)).max()
    assert max(errors.values()) < 1, errors


def test_pictures_in_a_batch_do_not_disturb_each_other(folder, caplog):
    single, many = (load(folder, threshold=0.1, batch_size=size) for size in (1, 8))
    pictures = [_noise(90, 64, seed=i) for i in range(3)]
    texts = [["a beak", "two red wings"], ["a"], ["a tail", "a beak", "thin grey legs", "an eye"]]
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


def test_texts_that_the_text_towers_could_not_take(folder):
    texts = [
        "a beak " * 200,
        "what? a 3.5 cm beak. red.",
        "<|endoftext|> [SEP] [PAD] !",
        "...",
        "喙",
        "a beak",
    ]
    (regions,) = load(folder, threshold=0.1).detect([_noise(64, 64)], [texts])
    assert {region.description for region in regions} <= set(texts)
    assert regions


def test_a_model_in_an_object_store_is_loaded_too(folder, monkeypatch):
    local = str(pathlib.Path(folder).parent)
    real = local_models.epath.Path
    path = lambda name: real(str(name).replace("gs://bucket", local))
    monkeypatch.setattr(local_models.epath, "Path", path)
    finder = load(f"gs://bucket/{pathlib.Path(folder).name}", threshold=0.0)
    assert finder.detect([_noise(64, 64)], [["a beak"]])[0]
