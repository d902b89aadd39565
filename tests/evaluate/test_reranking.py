"""Retrieval in two stages: against loops in float64, ties, what is asked and how much at a time; the stored weight."""

import json
import re
import statistics
from typing import Any

import msgspec
import numpy as np
import pytest

from grain_jax import config, inference
from grain_jax.config import evals
from grain_jax.core import errors, regular_file
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import suite
from grain_jax.inference import rerank, scores
from grain_jax.inference.inputs import InputError
from tests.evaluate.speaking import SpeakingStub
from tests.evaluate.stub import StubPredictor, annotate, measure

COUNT = 40  # images: more than those of the prior


def captions(i):
    """Two of each image, of which the first is shared by two images."""
    return [f"shared {i // 2}", f"own {i}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(options of the evaluator, a stub with random vectors and likelihoods that know the right answers)."""
    given = annotate(
        tmp_path_factory.mktemp("data"), [{"captions": captions(i)} for i in range(COUNT)]
    )
    random = np.random.default_rng(0)
    texts = list(dict.fromkeys(text for i in range(COUNT) for text in captions(i)))
    images = {i: random.normal(size=8) for i in range(COUNT)}
    vectors = {
        text: sum(images[i] for i in range(COUNT) if text in captions(i))
        + random.normal(size=8) * 2
        for text in texts
    }
    language = {text: random.normal() * 9 for text in texts}
    log_p = {
        (i, text): -30 + language[text] + random.normal() * 4 + 5 * (text in captions(i))
        for i in range(COUNT)
        for text in texts
    }
    return given, images, vectors, log_p


def by_loops(images, vectors, log_p, top, weight, scale=20.0):
    """R@1, R@5 and R@10 of both directions, in float64."""
    unit = lambda x: np.asarray(x, np.float64) / np.linalg.norm(x)
    texts = list(vectors)
    cosine = {(i, t): float(unit(images[i]) @ unit(vectors[t])) for i in images for t in texts}
    sample = np.round(np.linspace(0, len(images) - 1, 32)).astype(int).tolist()

    def prior(i, text):
        others = [log_p[j, text] for j in sample if j != i]
        return statistics.median(others)

    def ranked(items, pair, less):
        order = sorted(items, key=lambda x: -cosine[pair(x)])
        score = lambda x: scale * cosine[pair(x)] + weight * (log_p[pair(x)] - less(*pair(x)))
        return sorted(order[:top], key=lambda x: -score(x)) + order[top:]

    out = {"image_to_text": {}, "text_to_image": {}}
    for k in (1, 5, 10):
        hits = [
            any(t in captions(i) for t in ranked(texts, lambda t: (i, t), prior)[:k])  # noqa: B023
            for i in images
        ]
        out["image_to_text"][f"r{k}"] = np.mean(hits)
        asked = [t for i in images for t in captions(i)]
        none = lambda i, t: 0.0
        hits = [
            any(t in captions(i) for i in ranked(images, lambda i: (i, t), none)[:k])  # noqa: B023
            for t in asked
        ]
        out["text_to_image"][f"r{k}"] = np.mean(hits)
    return out


@pytest.mark.parametrize("top, weight", [(10, 0.25), (3, 1.0), (10, 0.0), (1000, 5.0)])
def test_rates_are_those_of_loops(data, top, weight, monkeypatch):
    given, images, vectors, log_p = data
    options = dict(given, rerank=top, rerank_weight=weight)
    stub = SpeakingStub(images, vectors, log_p=log_p)
    result = measure("retrieval", stub, **options)
    expected = by_loops(images, vectors, log_p, top, weight)
    for way, rates in expected.items():
        got = result["reranked"][way]
        assert {key: got[key] for key in rates} == pytest.approx(rates), way
        assert got["chance_r5"] == result[way]["chance_r5"]
        # Those without are as they would be, and reordering the first ten leaves R@10.
        assert weight or got == result[way]
        assert top != 10 or got["r10"] == result[way]["r10"]
    assert (result["rerank_weight"], result["reranked"]["candidates"]) == (weight, top)
    assert result["rerank_from"] == f"weight {weight:g}, as given"
    r1 = [result["image_to_text"]["r1"], result["reranked"]["image_to_text"]["r1"]]
    assert weight != 0.25 or r1 == [0.225, 0.325]
    monkeypatch.setattr(scores, "AT_ONCE", 7)
    monkeypatch.setattr(rerank, "_AT_ONCE", 16)
    assert measure("retrieval", stub, **options, batch_size=3) == result


def test_each_pair_is_asked_once_and_few_at_a_time(data, monkeypatch):
    given, images, vectors, log_p = data
    monkeypatch.setattr(rerank, "_AT_ONCE", 16)
    stub = SpeakingStub(images, vectors, log_p=log_p)
    measure("retrieval", stub, **given, rerank=2, rerank_weight=0.5, batch_size=4)
    assert len(stub.pairs) == len(set(stub.pairs))
    assert max(texts for _, texts in stub.calls) <= 16 and max(n for n, _ in stub.calls) <= 4
    # Candidates of both directions, and those of images for the images of the prior.
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosine = unit(np.array(list(images.values()))) @ unit(np.array(list(vectors.values()))).T
    of_images, of_texts = np.argsort(-cosine, 1)[:, :2], np.argsort(-cosine, 0)[:2].T
    names = list(vectors)
    expected = {(i, names[t]) for i in images for t in of_images[i]}
    expected |= {(i, names[t]) for t in range(len(names)) for i in of_texts[t].tolist()}
    sample = np.round(np.linspace(0, COUNT - 1, 32)).astype(int).tolist()
    expected |= {(i, names[t]) for i in sample for t in set(of_images.ravel().tolist())}
    assert set(stub.pairs) == expected


def test_prior_by_hand():
    """Three images, all of them in the sample; two texts."""
    image_embed = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    text_embed = np.array([[1, 0], [0, 1]], np.float32)
    stage = rerank.first_stage(image_embed, text_embed, 2)
    assert stage.sample.tolist() == [0, 1, 2] and len(stage.keys) == 6
    log_p = np.array([[-1, -9], [-4, -5], [-10, -2]], float)
    of_images, of_texts = rerank.parts(stage, log_p.reshape(-1), image_embed, text_embed)
    # Text 0 beside image 0: -1 less the median of -4 and -10; and so on.
    gain = [[-1 + 7, -9 + 3.5], [-4 + 5.5, -5 + 5.5], [-10 + 2.5, -2 + 7]]
    for i in range(3):
        np.testing.assert_allclose(of_images.gain[i], np.array(gain[i])[stage.texts[i]])
    np.testing.assert_allclose(of_images.cosine[1], [0.6, 0.8], rtol=1e-6)
    expected = 2 * of_images.cosine[1] + 0.5 * of_images.gain[1]
    np.testing.assert_allclose(of_images.scores(2, 0.5)[1], expected)
    np.testing.assert_allclose(of_texts.gain[0], log_p[stage.images[0], 0])
    best = rerank.ordered(stage, (of_images, of_texts), 1.0, 1.0)
    assert best.texts.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert best.images.tolist() == [[0, 1], [2, 1]]
    assert best.text_scores[0] == pytest.approx([1 + 6, 0 - 5.5])
    assert best.image_scores[1] == pytest.approx([1 - 2, 0.8 - 5])


def test_one_match_does_not_move_the_prior():
    """Five images with a text each, of which only the own one is likely: every prior is that of the others."""
    embed = np.eye(5, dtype=np.float32)
    stage = rerank.first_stage(embed, embed, 5)
    log_p = -50.0 + 40 * np.eye(5) - np.arange(5)  # a language prior of each text
    of_images, _ = rerank.parts(stage, log_p.reshape(-1), embed, embed)
    np.testing.assert_allclose(of_images.gain, 40 * np.eye(5), atol=1e-12)


def test_the_weight_lies_beside_its_model():
    for folder, expected in (
        ("/runs/a/checkpoints/700", "/runs/a"),
        ("/data/checkpoints/clip", "/data/checkpoints/clip"),
        ("/data/siglip", "/data/siglip"),
    ):
        assert str(rerank.path_of(folder)) == f"{expected}/rerank.json"


def test_equal_scores_are_ties(tmp_path):
    given = annotate(tmp_path, [{"caption": f"text {i}"} for i in range(6)])
    texts = [f"text {i}" for i in range(6)]
    same = {(i, text): -3.0 for i in range(6) for text in texts}
    ones = dict.fromkeys(range(6), [1, 0]), dict.fromkeys(texts, [1, 0])
    result = measure(
        "retrieval", SpeakingStub(*ones, log_p=same), **given, rerank=3, rerank_weight=0.5
    )
    # Of six that tie the first three are candidates, and right ones among them win a third of the draws.
    assert result["reranked"]["image_to_text"]["r1"] == pytest.approx(1 / 6)
    assert result["reranked"]["text_to_image"]["r1"] == pytest.approx(1 / 6)
    # A likelihood that knows the answers finds those that are candidates.
    known = {(i, text): -3.0 + (text == f"text {i}") for i, text in same}
    result = measure(
        "retrieval", SpeakingStub(*ones, log_p=known), **given, rerank=3, rerank_weight=0.5
    )
    assert result["reranked"]["image_to_text"]["r1"] == 0.5
    with pytest.raises(
        InputError, match="^the text decoder gives likelihoods that are not finite$"
    ):
        known[0, "text 0"] = float("nan")
        stub = SpeakingStub(*ones, log_p=known)
        measure("retrieval", stub, **given, rerank=3, rerank_weight=0.5)


def test_the_weight_is_chosen_stored_and_read(data, tmp_path, capsys):
    given, images, vectors, log_p = data
    stub = SpeakingStub(images, vectors, log_p=log_p)
    stub.folder = str(tmp_path / "run" / "checkpoints" / "700")
    (tmp_path / "run" / "checkpoints" / "700").mkdir(parents=True)
    found = measure("retrieval", stub, **given, rerank=10, choose_weight=True)
    tried = {}
    for weight in (0, 0.05, 0.1, 0.25, 0.5, 1, 2):
        expected = by_loops(images, vectors, log_p, 10, weight)
        tried[f"{weight:g}"] = np.mean([rates["r1"] for rates in expected.values()])
    assert {name: one["r1"] for name, one in found["weights"].items()} == pytest.approx(tried)
    best = max(tried, key=lambda name: tried[name])
    assert found["rerank_weight"] == float(best) > 0
    path = tmp_path / "run" / "rerank.json"
    said = f"weight {best} of {path}, chosen for the first 10 on {given['annotations']} (40 images)"
    same = said + ", the annotations that are measured here: no test"
    assert capsys.readouterr().err.endswith(f"retrieval: reranked 10 by {same}\n")
    assert found["rerank_from"] == same
    stored = json.loads(path.read_text())
    assert stored["value"] == pytest.approx(tried[best])
    assert stored["without"] == pytest.approx(tried["0"])
    assert stored["prior"] == "median log-likelihood over 32 images" and stored["captions"] == 80
    # The same annotations are known by their bytes, under another name, too.
    copy = tmp_path / "test.jsonl"
    copy.write_bytes(given["annotations"].read_bytes())
    for name in (given["annotations"], copy):
        again = measure("retrieval", stub, **given | dict(annotations=name), rerank=10)
        assert again["reranked"] == found["reranked"] and again["rerank_from"] == same
    copy.write_bytes(copy.read_bytes().replace(b"own 0", b"own 1"))
    again = measure("retrieval", stub, **given | dict(annotations=copy), rerank=10)
    assert again["rerank_from"] == said
    # Another checkpoint of the run finds it, and is another model.
    stub.folder = str(tmp_path / "run" / "checkpoints" / "900")
    stub.digest = "of another"
    with pytest.raises(InputError) as fault:
        measure("retrieval", stub, **given, rerank=10)
    assert str(fault.value).startswith(
        f"{path}: got the weight of another model ({tmp_path / 'run' / 'checkpoints' / '700'}), expected"
    )
    assert str(fault.value).endswith(f"; or give --rerank-weight {best}")


def test_the_largest_weight_is_said_and_a_named_model_stores_none(
    data, tmp_path, monkeypatch, capsys
):
    given, images, vectors, log_p = data
    stub = SpeakingStub(images, vectors, log_p=log_p)
    folder = tmp_path / "models--org--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    stub.folder = str(folder)
    monkeypatch.setattr(rerank, "WEIGHTS", (0.0, 0.05))
    found = measure("retrieval", stub, **given, rerank=10, choose_weight=True)
    assert found["rerank_weight"] == 0.05 and not list(folder.iterdir())
    assert found["rerank_from"].endswith("a name stands for: give --rerank-weight 0.05")
    largest = "retrieval: choose_weight: 0.05, the largest that was tried, is best; a larger one"
    assert capsys.readouterr().err.count(largest) == 1
    stub.log_p = dict.fromkeys(log_p, -3.0)  # all weights are equal, and the smallest is taken
    measure("retrieval", stub, **given, rerank=10, choose_weight=True)
    assert "that was tried" not in capsys.readouterr().err


def test_a_suite_measures_again_by_another_weight(data, tmp_path, capsys):
    given, images, vectors, log_p = data
    stub = SpeakingStub(images, vectors, log_p=log_p)
    stub.folder = str(tmp_path)
    options = {key: str(value) for key, value in given.items()}
    entry = dict(kind="retrieval", rerank=10, **options)
    chooses = {"val": entry | dict(choose_weight=True)}
    line = r"^evals.val.choose_weight: got True in a suite, expected it of one set of validation"
    with pytest.raises(config.ConfigError, match=line):
        config.suite_from_dict(dict(evals=chooses))
    measure("retrieval", stub, **given, rerank=10, choose_weight=True)
    capsys.readouterr()
    both = {"again": entry, "test": entry}
    output = tmp_path / "suite.json"

    def ran(entries=both):
        found = config.suite_from_dict(dict(evals=entries))
        assert suite.run(found, output, checkpoint="RUN", load=lambda: stub) == 0
        return json.loads(output.read_text())["ran"], capsys.readouterr().err

    first, _ = ran()
    assert first["test"]["reranked"] == first["again"]["reranked"]
    again, said = ran()
    assert again == first and said.count("is in") == 2
    chosen = rerank.read(tmp_path)
    assert chosen is not None
    rerank.write(tmp_path, msgspec.structs.replace(chosen, weight=0.05))
    other, said = ran({"test": entry})
    assert "is in" not in said and other["test"]["rerank_weight"] == 0.05
    assert other["test"]["reranked"] != first["test"]["reranked"]


def test_what_does_not_fit_is_one_line(data, tmp_path):
    given, images, vectors, log_p = data
    stub = SpeakingStub(images, vectors, log_p=log_p)

    def fault(kind=errors.UserError, stub: Any = stub, given=given, **options):
        with pytest.raises(kind) as found:
            measure("retrieval", stub, **given, **({"rerank": 10} | options))
        assert "\n" not in str(found.value)
        return str(found.value)

    silent = StubPredictor(images, vectors)
    assert "rerank: the model has no text decoder, expected" in fault(
        stub=silent, rerank_weight=1.0
    )
    assert "in no folder; give one (--rerank-weight, weight=), or choose it: grain-jax" in fault()
    assert "expected one to store the weight in" in fault(choose_weight=True)
    stub.folder = str(tmp_path)
    path = tmp_path / "rerank.json"
    assert f"no weight is given, and {path}: no such file; give" in fault()
    chosen = rerank.Chosen(
        weight=0.5,
        prior=rerank.PRIOR,
        top=10,
        model=stub.digest,
        annotations="A.jsonl",
        annotations_digest="",
        pictures=9,
        captions=9,
        measure="R@1",
        value=0.5,
        without=0.25,
        checkpoint=str(tmp_path),
    )
    assert rerank.write(tmp_path, chosen) == path and rerank.read(tmp_path) == chosen
    for damage, said in (
        ('"weight": 0.5', "Object missing required field `weight`"),
        ("0.5", "Expected `float` <= 1000000.0 - at `$.weight`"),
        (None, "JSON is malformed"),
    ):
        rerank.write(tmp_path, chosen)
        text = path.read_text()
        text = (
            text[:20]
            if damage is None
            else text.replace(damage, "1e9" * (damage == "0.5") or '"x": 1', 1)
        )
        path.write_text(text)
        found = fault(regular_file.FileError)
        assert found.startswith(f"{path}: ") and "expected the weight that --choose-weight" in found
        assert damage is None or said in found
    path.unlink()
    path.mkdir()
    assert "got a folder, pipe or device" in fault(regular_file.FileError)
    assert "expected a folder of the model to write the weight to" in fault(choose_weight=True)
    (tmp_path / "one").mkdir()
    one = annotate(tmp_path / "one", [{"captions": captions(0)}])
    assert "got 1 image, expected 2 or more" in fault(given=one, rerank_weight=1.0)


def test_options_that_contradict_each_other():
    cls: Any = evals.find("retrieval")
    assert cls().faults() == cls(rerank=10).faults() == []
    assert cls(rerank=10, choose_weight=True).faults() == []
    (line,) = cls(rerank_weight=0.5).faults()
    assert line.startswith("rerank: got 0 with rerank_weight, expected")
    (line,) = cls(rerank=5, choose_weight=True, rerank_weight=0.5).faults()
    assert line.startswith("rerank_weight: got 0.5 with choose_weight,")
    # In a run no weight is stored with the model, and its images are no validation data to choose it on.
    assert cls().misses(None) == cls(rerank=10, rerank_weight=0.25).misses(None) == []
    (line,) = cls(rerank=10).misses(None)
    assert line.startswith("rerank_weight: got None in a run")
    (line,) = cls(rerank=10, choose_weight=True).misses(None)
    assert line.startswith("choose_weight: got True in a run")
    assert cls(rerank=1).needs_text_decoder and not cls().needs_text_decoder


def test_command(data, tmp_path, monkeypatch, capsys):
    given, images, vectors, log_p = data
    stub = SpeakingStub(images, vectors, log_p=log_p)
    stub.folder = str(tmp_path)
    monkeypatch.setattr(inference, "load", lambda path, **_: stub)
    monkeypatch.setattr(command.saved_model, "find", lambda path: path)
    words = ["retrieval", "--checkpoint", "RUN", "--images", str(given["images"]), "--cache", ""]
    words += ["--annotations", str(given["annotations"]), "--output", str(tmp_path / "r.json")]
    assert command.main([*words, "--rerank", "10"]) == 2
    assert "or choose it: grain-jax evaluate retrieval" in capsys.readouterr().err
    assert command.main([*words, "--rerank", "10", "--choose-weight"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"retrieval: R@1, mean of both, at weight 0\.25 +\d", table)
    assert command.main([*words, "--rerank", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition("  ")[0] for line in lines]
    assert names[2:6] == [
        "retrieval: image to text R@1",
        "retrieval: image to text R@1, reranked",
        "retrieval: image to text R@5",
        "retrieval: image to text R@5, reranked",
    ]
    assert len(names) == 2 + 12
    assert command.main([*words, "--rerank-weight", "0.5"]) == 2
    assert "--rerank: got 0 with rerank-weight" in capsys.readouterr().err
