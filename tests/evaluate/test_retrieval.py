import numpy as np
import pytest

from grain_jax.evaluate import rates
from grain_jax.inference import scores
from tests.evaluate.stub import StubPredictor, annotate, measure

pytestmark = pytest.mark.quick


def test_hand_computed(tmp_path):
    options = annotate(
        tmp_path,
        [
            {"captions": ["one", "uno"]},
            {"caption": "two", "synthetic_caption": "not used"},
            {"synthetic_caption": "three"},
            {"regions": []},  # has no caption at all
        ],
    )
    texts = {"one": [1, 0, 0], "uno": [0.6, 0.8, 0], "two": [0, 1, 0], "three": [0, 0, 1]}
    images = {0: [0.1, 1, 0], 1: [0, 1, 0.1], 2: [0, 0.2, 1]}
    predictor = StubPredictor(images, texts)
    result = measure("retrieval", predictor, **options)
    assert predictor.asked == ["one", "uno", "two", "three"]
    assert (result["images"], result["captions"], result["distinct_captions"]) == (3, 4, 4)
    assert result["synthetic_captions"] == 1 and result["without_caption"] == 1
    # Images: 0 finds "two" first (1 against uno .86): wrong, then uno; 1 "two"; 2 "three".
    way = result["image_to_text"]
    assert way["r1"] == pytest.approx(2 / 3) and way["r5"] == 1.0
    assert (way["r1_low"], way["r1_high"]) == pytest.approx(rates.interval(2, 3))
    # By chance: image 0 has two of four texts, the others one of four.
    assert way["chance_r1"] == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    # Texts: one -> 0 (right), uno -> 0 (.86 against .796: right), two -> image 0 (.995, .995): a tie
    # of .1 and .1, which counts half; three -> 2.
    way = result["text_to_image"]
    assert way["r1"] == pytest.approx(3.5 / 4) and way["r10"] == 1.0
    assert way["chance_r1"] == pytest.approx(1 / 3)


def test_equal_captions_are_right_for_each_other(tmp_path):
    options = annotate(tmp_path, [{"caption": "A  bird"}, {"caption": "a bird"}, {"caption": "a fish"}])
    texts = {"A  bird": [1, 0], "a fish": [0, 1]}
    images = {0: [1, 0], 1: [0.9, 0.1], 2: [0.1, 1]}
    result = measure("retrieval", StubPredictor(images, texts), **options)
    assert (result["captions"], result["distinct_captions"]) == (3, 2)
    assert result["image_to_text"]["r1"] == 1.0
    assert result["text_to_image"]["r1"] == 1.0
    # Both lines that say "a bird" are asked, and either image is right for it.
    assert result["text_to_image"]["chance_r1"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_chunks_do_not_matter(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    options = annotate(tmp_path, [{"captions": [f"{i} a", f"{i} b"]} for i in range(23)])
    texts = {f"{i} {x}": random.normal(size=6) for i in range(23) for x in "ab"}
    predictor = StubPredictor({i: random.normal(size=6) for i in range(23)}, texts)
    whole = measure("retrieval", predictor, **options)
    monkeypatch.setattr(scores, "AT_ONCE", 5)
    assert measure("retrieval", predictor, **options, batch_size=4) == whole
    # Against the definition.
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    similarity = unit(np.array([*predictor.images.values()])) @ unit(np.array([*texts.values()])).T
    order = np.argsort(-similarity, axis=1)
    for k in (1, 5, 10):
        measured = [(order[i, :k] // 2 == i).any() for i in range(23)]
        assert whole["image_to_text"][f"r{k}"] == pytest.approx(np.mean(measured))
        measured = [j // 2 in np.argsort(-similarity[:, j])[:k] for j in range(46)]
        assert whole["text_to_image"][f"r{k}"] == pytest.approx(np.mean(measured))
