import dataclasses
import itertools
import json

import numpy as np
import pytest
import scipy.stats

from grain_jax import config
from grain_jax.evaluate import base
from tests.evaluate.stub import StubPredictor, write_picture


@pytest.mark.parametrize(
    "successes, count", [(0, 1), (0, 40), (1, 1), (7, 9), (776, 1000), (50, 50)]
)
def test_interval_is_scipys_wilson(successes, count):
    expected = scipy.stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(
        base.interval(successes, count), (expected.low, expected.high), atol=1e-12
    )


def test_interval_of_nothing():
    assert base.interval(0, 0) == (0.0, 1.0)
    assert base.rate("r1", np.array([])) == {"r1": 0.0, "r1_low": 0.0, "r1_high": 1.0}


def test_interval_of_a_mean_over_classes_is_that_of_all_where_they_are_alike():
    shares, counts = np.array([0.5, 0.75, 1.0]), np.array([40, 40, 40])
    found = base.mean_rate("m", shares, counts)
    assert found["m"] == 0.75
    assert (found["m_low"], found["m_high"]) == pytest.approx(base.interval(90, 120))
    # Unlike ones, of one p: it holds the mean in about 95% of the cases, also near 1.
    random = np.random.default_rng(0)
    counts = np.array([3, 5, 10, 40] * 10)
    held = []
    for p in (0.3, 0.97):
        for _ in range(500):
            found = base.mean_rate("m", random.binomial(counts, p) / counts, counts)
            held.append(found["m_low"] <= p <= found["m_high"])
    assert 0.93 < np.mean(held) < 0.97


def _by_enumeration(scores, right, k):
    """The mean over all orders of the candidates of: sorted by score, is a right one among the first k?"""
    orders = list(itertools.permutations(range(len(scores))))
    first = [sorted(order, key=lambda c: -scores[c])[:k] for order in orders]
    return np.mean([any(right[c] for c in chosen) for chosen in first])


@pytest.mark.parametrize("seed", range(4))
def test_topk_hits_break_ties_at_random(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 3, (6, 6)).astype(float)
    right = random.random((6, 6)) < 0.3
    right[np.arange(6), random.integers(6, size=6)] = True
    for k in (1, 2, 5, 9):
        expected = [_by_enumeration(s, r, k) for s, r in zip(scores, right)]
        np.testing.assert_allclose(base.topk_hits(scores, right, k), expected, atol=1e-12)
        np.testing.assert_allclose(
            base.chance_of_topk(right, k), base.topk_hits(0 * scores, right, k), atol=1e-12
        )


def test_a_model_that_knows_nothing_scores_chance():
    right = np.eye(40, dtype=bool)
    assert base.topk_hits(np.ones((40, 40)), right, 1).mean() == pytest.approx(1 / 40)
    assert base.topk_hits(np.ones((40, 40)), right, 5).mean() == pytest.approx(5 / 40)


def test_pictures_come_in_order_and_the_unreadable_are_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i in (0, 1, 3, 4, 6):
        write_picture(paths[i], i, size=(10 + i, 5))
    paths[2].write_bytes(b"no picture")  # paths[5] does not exist
    predictor = StubPredictor(images={i: [i, 1.0] for i in range(7)})
    unreadable = {}
    batches = list(
        base.encode_pictures(
            predictor, paths, label="", unreadable=unreadable, regions=False, batch_size=3
        )
    )
    assert [b.index.tolist() for b in batches] == [[0, 1], [3, 4], [6]]
    assert [size for b in batches for size in b.sizes] == [
        (10, 5),
        (11, 5),
        (13, 5),
        (14, 5),
        (16, 5),
    ]
    assert np.concatenate([b.image_embed for b in batches])[:, 0].tolist() == [0, 1, 3, 4, 6]
    assert set(unreadable) == {str(paths[2]), str(paths[5])}
    report = base.report_unreadable(unreadable)
    assert report["unreadable"] == 2
    assert (
        "2.png" in report["unreadable_pictures"][0] and "5.png" in report["unreadable_pictures"][1]
    )
    with pytest.raises(base.InputError, match="none of 1 images can be read.*2.png"):
        list(base.encode_pictures(predictor, paths[2:3], label="", unreadable={}))


def test_not_finite_embeddings_are_an_error(tmp_path):
    write_picture(tmp_path / "0.png", 0)
    predictor = StubPredictor(images={0: [np.nan, 1.0]})
    with pytest.raises(base.InputError, match="not finite"):
        list(
            base.encode_pictures(
                predictor, [tmp_path / "0.png"], label="", unreadable={}, regions=False
            )
        )


def test_each_text_is_encoded_once():
    predictor = StubPredictor(texts={"a": [1, 0], "b": [0, 1], "c": [1, 1]})
    embeds = base.encode_texts(predictor, [["a", "b"], ["b", "c", "a"]])
    assert predictor.asked == ["a", "b", "c"]
    assert embeds[1].tolist() == [[0, 1], [1, 1], [1, 0]]


def test_scalars():
    result = {
        "kind": "x",
        "n": 3,
        "names": True,
        "alpha_1.0": {"top1": 0.5, "per_class": {"a": 1.0}},
    }
    assert base.scalars(result) == {"n": 3.0, "alpha_1.0/top1": 0.5}


def _entry(**fields):
    entry = dict(kind="zeroshot", images="", descriptions=None, annotations=None, alphas=(1.0, 0.5))
    return config.Evaluator(**entry | dict(names=True, region_order="queries") | fields)


def test_check_finds_every_fault_before_there_is_a_model(tmp_path):
    write_picture(tmp_path / "classes" / "cat" / "0.png", 0)
    write_picture(tmp_path / "classes" / "dog" / "0.png", 1)
    (tmp_path / "D.json").write_text('{"cat": ["whiskers"]}')
    (tmp_path / "broken.json").write_text("{")
    good = _entry(images=str(tmp_path / "classes"), alphas=(1.0, 0.5))
    base.check(good)  # alpha 0.5 does not count without descriptions

    def faults(**fields):
        with pytest.raises(base.InputError) as found:
            base.check(dataclasses.replace(good, **fields))
        return str(found.value).split("\n")

    assert faults(images="no/such") == [
        "no/such: no such folder; expected one with a sub-folder a class"
    ]
    described = dict(descriptions=str(tmp_path / "D.json"))
    assert faults(**described, alphas=(0.5, 2.0), region_order="x") == [
        f"{tmp_path}/D.json: no description of the classes dog",
        "alpha: got 2.0, expected a number from 0 to 1",
        "region order: got 'x', expected one of queries, descriptions",
    ]
    assert "got -1.0" in faults(alphas=(1.0, -1.0))[0]
    assert "for a test without class names" in faults(names=False)[0]
    assert "no.json: no such file" in faults(descriptions="no.json")[0]
    assert "broken.json: not JSON" in faults(descriptions=str(tmp_path / "broken.json"))[0]
    with pytest.raises(base.InputError, match="got 'captioning', expected one of zeroshot"):
        base.check(_entry(kind="captioning"))


@pytest.mark.parametrize("kind", ["retrieval", "grounding"])
def test_check_of_annotations(tmp_path, capsys, kind):
    write_picture(tmp_path / "0.png", 0)
    region = {"box": [0, 0, 5, 5], "description": "a beak", "score": 1, "mask": 0}
    line = {"image": "0.png", "caption": "a", "regions": [region], "licence": "CC0"}
    path = tmp_path / "A.jsonl"
    path.write_text((json.dumps(line) + "\n") * 200 + "{}\n")
    good = _entry(kind=kind, images=str(tmp_path), annotations=str(path))
    base.check(good)
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:201: image: got none, expected the path of an image",
        f"{path}: faulty lines left out: 1",
        f"{path}: unknown keys kept out: licence (200), regions.mask (200)",
    ]

    def faults(**fields):
        with pytest.raises(base.InputError) as found:
            base.check(dataclasses.replace(good, **fields))
        return str(found.value).split("\n")

    no_folder = "no: no such folder; expected the one that the annotations' paths start from"
    assert faults(images="no") == [no_folder]
    assert faults(images="no", annotations="no.jsonl") == [
        no_folder,
        "no.jsonl: no such file, expected one JSON object a line",
    ]
    (tmp_path / "empty").mkdir()
    assert "none of the 200 images of" in faults(images=str(tmp_path / "empty"))[0]
    path.write_text('{"image": "0.png"}\n[]\n')
    assert "2 lines are faulty, more than 1%" in faults()[-1]
    path.write_text('{"image": "0.png"}\n')
    assert "no line has a " in faults()[0]
    assert "annotations: got nothing" in faults(annotations=None)[0]


def test_run_dispatches(tmp_path):
    for i, name in enumerate(("cat", "red_fox")):
        write_picture(tmp_path / name / "0.png", i)
    (tmp_path / "templates.txt").write_text("a {}\n")
    predictor = StubPredictor(
        images={0: [1, 0], 1: [1, 0]}, texts={"a cat": [1, 0], "a red fox": [0, 1]}
    )
    # Without descriptions there is no region score: only alpha 1 is reported.
    entry = _entry(images=str(tmp_path), templates=str(tmp_path / "templates.txt"))
    numbers = base.run(entry, predictor)
    assert numbers["alpha_1.0/top1"] == 0.5 and numbers["chance"] == 0.5
    assert not any(key.startswith("alpha_0.5") for key in numbers)
    assert all(type(value) is float for value in numbers.values())
    with pytest.raises(base.InputError, match="annotations: got nothing"):
        base.run(_entry(kind="grounding", images=str(tmp_path)), predictor)
    with pytest.raises(base.InputError, match="expected one of zeroshot, linear_probe, retrieval"):
        base.run(_entry(kind="captioning", images=str(tmp_path)), predictor)
