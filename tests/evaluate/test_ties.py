"""docs/evaluate.md: ties count as if broken at random (of ranks: as lost), at every batch size, in every function."""

import collections
import json
from unittest import mock

import numpy as np
import pytest

from grain_jax.evaluate import (
    retrieval,
    zeroshot,
)
from grain_jax.inference import scores
from tests.evaluate.stub import StubPredictor, measure, number, write_picture

COUNT, DIM = 69, 97  # images; odd, so that BLAS sums the last columns in another order
CLASSES = "ant", "bee", "cat"
SIZES = (1, 7, 64)


class _Predictor(StubPredictor):
    def similarity_maps(self, images, text_embeds):
        """Flat but for rounding."""
        noise = [np.random.default_rng(number(image)).random((4, 4)) for image in images]
        return [np.float32(0.3) + np.float32(2e-7) * x[None] for x in noise]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("ties"), np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        path = folder / "classes" / CLASSES[i % 3] / f"{i}.png"
        write_picture(path, i)
        regions = [
            {"box": box, "description": f"{i} {name}", "score": 1, "negatives": list("negativs")}
            for box, name in (([0, 0, 5, 10], "left"), ([5, 0, 10, 10], "right"))
        ]
        image = str(path.relative_to(folder))
        lines.append(json.dumps({"image": image, "caption": f"caption {i}", "regions": regions}))
    (folder / "A.jsonl").write_text("\n".join(lines))
    (folder / "D.json").write_text(json.dumps({name: [f"{name} leg"] for name in CLASSES}))
    boxes = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    images = {i: random.normal(size=DIM) for i in range(COUNT)}
    regions = {i: (boxes, random.normal(size=(1, DIM)).repeat(2, 0)) for i in range(COUNT)}
    text = random.normal(size=DIM)  # every text has this embedding
    alike = collections.defaultdict(lambda: text, {"": text})
    return folder, _Predictor(images, alike, regions)


def _classified(found):
    """top-1 of three classes, whichever is right."""
    assert found["per_class"] == pytest.approx(dict.fromkeys(CLASSES, 1 / 3))
    return found["top1"], found["top5"]


def _zeroshot(folder, predictor, **given):
    given |= dict(images=folder / "classes", descriptions=folder / "D.json", alphas=(1.0, 0.5, 0.0))
    for order in zeroshot.REGION_ORDERS:
        found = measure("zeroshot", predictor, region_order=order, **given)
        for result in (found, found["by_name"]):
            for key in ("alpha_1.0", "alpha_0.5", "alpha_0.0"):
                assert _classified(result[key]) == pytest.approx((1 / 3, 1))
    return found


def _retrieval(folder, predictor, **given):
    with mock.patch.object(scores, "AT_ONCE", given["batch_size"]):
        found = measure("retrieval", predictor, **_annotated(folder), **given)
    for way in ("image_to_text", "text_to_image"):
        found[way] = {key: value for key, value in found[way].items() if key[0] == "r"}
    for k in retrieval.KS:
        assert found["image_to_text"][f"r{k}"] == pytest.approx(k / COUNT)
    return found


def _hard_negatives(folder, predictor, **given):
    found = measure("hard_negatives", predictor, negatives=8, **_annotated(folder), **given)
    for key in ("region", "image"):
        assert found[key]["top1"] == pytest.approx(1 / 9)
        assert found[key]["mean_rank"] == found[key]["median_rank"] == 9  # lost against all
    return found


def _boxes(folder, predictor, **given):
    found = measure("boxes", predictor, **_annotated(folder), **given)
    assert found["region"]["top1"] == found["image"]["top1"] == pytest.approx(1 / (2 * COUNT))
    return found


def _grounding(folder, predictor, **given):
    found = measure("grounding", predictor, **_annotated(folder), **given)
    assert found["region_to_description_r1"] == pytest.approx(1 / (2 * COUNT))
    assert found["phrase_acc50"] == 0.5  # of two queries alike, one has the box
    return found


def _maps(folder, predictor, **given):
    found = measure("maps", predictor, **_annotated(folder), **given)
    assert found["pointing"] == found["chance_pointing"] == 0.5 and found["map_iou"] == 0
    return found


def _linear_probe(folder, predictor, **given):
    """Images alike: the intercepts, of classes of one size, are the same but for rounding."""
    same = StubPredictor(dict.fromkeys(range(COUNT), np.ones(DIM)))
    found = measure("linear_probe", same, images=folder / "classes", **given)
    assert _classified(found["shots_all"])[0] == pytest.approx(1 / 3)
    return found


def _annotated(folder):
    return dict(images=folder, annotations=folder / "A.jsonl")


@pytest.mark.parametrize(
    "measure",
    [_zeroshot, _retrieval, _hard_negatives, _boxes, _grounding, _maps, _linear_probe],
)
def test_equal_scores_are_ties_at_every_batch_size(measure, data):
    first, *others = [measure(*data, batch_size=size) for size in SIZES]
    assert all(other == first for other in others)
