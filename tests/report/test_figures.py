import io
import json
import math

import jax
import numpy as np
import PIL.Image
import pytest

from grain_jax import config, losses
from grain_jax.evaluate import test_sets
from grain_jax.report import figures
from tests import tiny
from tests.evaluate.stub import StubPredictor, write_picture
from tests.losses import test_losses

RESULTS = {
    "eval/seen_by_name/alpha_1.0/top1": 0.776,
    "eval/seen_by_name/alpha_1.0/top1_low": 0.75,
    "eval/seen_by_name/alpha_1.0/top1_high": 0.8,
    "eval/seen_by_name/alpha_1.0/top5": 0.9,
    "eval/seen_by_name/chance": 1 / 120,
    "eval/seen_by_name/pictures": 1200.0,
    "eval/unseen/alpha_1.0/top1": 0.28,
    "eval/unseen/alpha_0.5/top1": 0.78,
    "eval/test/image_to_text/r1": 0.25,
    "eval/test/image_to_text/chance_r1": 0.01,
    "eval/boxes/box_iou": 0.4641,
    "eval/boxes/chance_box_iou": 0.2,
    "eval/other/score": 3.0,
}


def test_table(capsys):
    kinds = dict.fromkeys(["seen_by_name", "unseen"], "zeroshot")
    kinds |= {"test": "retrieval", "boxes": "grounding", "other": "my.module:Mine"}
    figures.print_table(RESULTS, kinds)
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    assert words[0] == ["measured", "value", "95%", "interval", "chance", "of"]
    assert set(lines[1]) == {"-"}
    first = "seen by name: top-1, alpha 1  77.6%  75.0 - 80.0%  0.8%  1200 pictures"
    assert words[2] == first.split()
    labels = [line.split("  ")[0] for line in lines[2:]]
    assert labels == [
        "seen by name: top-1, alpha 1",
        "seen by name: top-5, alpha 1",
        "unseen: top-1, alpha 1",
        "unseen: top-1, alpha 0.5",
        "test: image to text R@1",
        "boxes: matched box IoU",
        "other: score",
    ]
    assert lines[7].split()[-2:] == ["0.464", "0.200"]
    assert len({len(line.split("%")[0]) for line in lines[2:6]}) == 1  # the columns are aligned


def _picture(path):
    return np.asarray(PIL.Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int)


def _has_colour(pixels, colour, at_least=20):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - rgb).max(axis=2) <= 2).sum() >= at_least


@pytest.mark.parametrize("evaluations", [0, 3])
def test_curves(tmp_path, evaluations):
    lines = []
    for step in range(1, 31):
        line = {"step": step, "loss": 9 / step, "loss_box": 1 / step, "loss_image_caption": 4.0}
        line |= {"logit_scale": 14.0, "learning_rate": 1e-3, "loss_region_description": 2.0}
        if step > 30 - evaluations:
            line |= RESULTS
        lines.append(json.dumps(line))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    (tmp_path / "config.json").write_text('{"batch_size": 64}')
    figures.curves(tmp_path / "metrics.jsonl", tmp_path / "new" / "curves.png")
    pixels = _picture(tmp_path / "new" / "curves.png")
    assert pixels.shape == (792, 1760, 3)  # six charts at most, and the bars
    assert _has_colour(pixels, "#333333") and _has_colour(pixels, figures.COLOURS[4])
    assert _has_colour(pixels[:, 1340:], "#333333", 2000) == bool(evaluations)  # the first bar


def test_the_caption_loss_at_chance(tmp_path):
    assert figures._caption_loss_at_chance(tmp_path) is None
    (tmp_path / "config.json").write_text('{"batch_size": 64}')
    assert figures._caption_loss_at_chance(tmp_path) == (math.log(64), "ln 64")
    c = tiny.config(input__captions_per_image=3, loss__mask_duplicates=False)
    (tmp_path / "config.json").write_text(config.to_json(c))
    batch, outputs = tiny.batch(c), test_losses._outputs(c)
    batch.caption_mask[:] = True
    outputs = outputs._replace(logit_scale=np.float32(0))
    loss = jax.jit(lambda *given: losses.total_loss(*given, c.loss))(outputs, batch)
    value = pytest.approx(float(loss.terms["image_caption"]))
    assert figures._caption_loss_at_chance(tmp_path) == (value, "ln √(16 x 46)")


def test_curves_of_a_run_that_logged_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    figures.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert _picture(tmp_path / "curves.png").shape == (792, 1760, 3)


def _annotations(tmp_path, count):
    lines = []
    for i in range(count):
        write_picture(tmp_path / f"{i}.png", 200 + i, size=(64, 64))
        regions = [
            {"box": [8, 8, 40, 40], "description": "a beak", "score": 0.9},
            {"box": [30, 30, 60, 60], "description": "a tail " + "that is long " * 9, "score": 0.8},
        ]
        lines.append(json.dumps({"image": f"{i}.png", "regions": regions}))
    lines.append(json.dumps({"image": "none.png"}))
    (tmp_path / "A.jsonl").write_text("\n".join(lines))
    return tmp_path / "A.jsonl"


class _Predictor(StubPredictor):
    def encode_text(self, texts):
        return np.eye(2, dtype=np.float32)[["tail" in text for text in texts]]


def _predictor():
    regions = ([[0.1, 0.1, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9], [0, 0, 1, 1]], np.eye(2)[[0, 0, 1]])
    numbers = range(200, 220)
    return _Predictor({n: [1, 0] for n in numbers}, {}, {n: regions for n in numbers})


@pytest.mark.parametrize("pictures_in_file, rows, columns", [(1, 1, 1), (9, 2, 4)])
def test_regions_grid(tmp_path, pictures_in_file, rows, columns):
    path = _annotations(tmp_path, pictures_in_file)
    figures.regions_grid(_predictor(), path, tmp_path, tmp_path / "grid.png", count=6)
    pixels = _picture(tmp_path / "grid.png")
    assert pixels.shape[1] == 352 * columns
    assert pixels.shape[0] > rows * 352
    for colour in figures.COLOURS[:2]:  # a box of each matched region, and its words
        assert _has_colour(pixels, colour, at_least=400)
        assert _has_colour(pixels[-130:], colour, at_least=5)
    assert not _has_colour(pixels, figures.COLOURS[2])  # a query without a region is not drawn


def test_what_the_regions_say():
    texts = ["a beak", "a tail"]
    lines = figures._wrapped(texts, np.array([0, 0]), np.array([0, 1]))
    assert lines == [
        (figures.COLOURS[0], "\u2713 a beak"),
        (figures.COLOURS[1], "\u2717 a beak (annotated: a tail)"),
    ]


def test_nothing_to_draw(tmp_path):
    (tmp_path / "A.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(test_sets.InputError, match="there is nothing to draw"):
        figures.regions_grid(_predictor(), tmp_path / "A.jsonl", tmp_path, tmp_path / "x.png")
