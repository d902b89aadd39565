"""Reranking by a stored model with a text decoder: the method, the commands, and a search."""

import json
import re

import jax
import numpy as np
import PIL.Image
import pytest

import grain_jax
from grain_jax import inference
from grain_jax.data.embed import __main__ as embed
from grain_jax.data.embed import search, search_command
from grain_jax.evaluate import __main__ as evaluate
from grain_jax.inference import rerank
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import checkpoint
from tests.evaluate.stub import write_lines
from tests.inference.test_text_decoder import folder, predictor  # noqa: F401 (fixtures)

TEXTS = ["a wren", "long red beak", "a long beak", "red", "wren a beak long red"]
PICTURES = np.random.default_rng(5).integers(0, 256, (4, 40, 40, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(their folder, A.jsonl), an image a caption; two captions are equal."""
    root = tmp_path_factory.mktemp("images")
    for i, picture in enumerate(PICTURES):
        PIL.Image.fromarray(picture).save(root / f"{i}.png")
    texts = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[0]]
    regions = [{"box": [0, 0, 20, 30], "description": "red beak", "score": 1}]
    lines = [
        {"image": f"{i}.png", "caption": text, "regions": regions} for i, text in enumerate(texts)
    ]
    write_lines(root / "A.jsonl", lines)
    return root, root / "A.jsonl"


def test_likelihoods_of_images_in_their_own_shape(folder, monkeypatch):  # noqa: F811
    """Of fewer and fewer images, each with its own grid."""
    monkeypatch.setattr(rerank, "_AT_ONCE", 1)
    stored = checkpoint.load_stored(folder)
    more = dict(text_decoder=stored.text_decoder, sequence_length=9)
    model = inference.Predictor(stored.model, stored.params, folder=folder, **more)
    pictures = [PICTURES[0], PICTURES[1][:10], PICTURES[2][:, :8]]
    texts = [TEXTS[:1], TEXTS[:2], TEXTS[:3]]
    ask = lambda _, *given: model.caption_log_likelihood(*given)
    found = rerank.log_likelihoods(ask, model.encode_tokens(pictures), texts)
    for picture, own, got in zip(pictures, texts, found, strict=True):
        np.testing.assert_allclose(got, model.caption_log_likelihood(picture, own), rtol=1e-5)


@pytest.mark.parametrize("top", [2, 10])
def test_rerank_is_the_sum_of_its_parts(predictor, top):  # noqa: F811
    cosine = predictor.encode_image(PICTURES) @ predictor.encode_text(TEXTS).T
    log_p = np.array(predictor.caption_log_likelihood(PICTURES, [TEXTS] * 4), np.float64)
    prior = np.stack(
        [np.median(np.delete(log_p, i, axis=0), axis=0) for i in range(4)]
    )  # of others
    to_text = predictor.logit_scale * cosine + 0.3 * (log_p - prior)
    to_image = predictor.logit_scale * cosine + 0.3 * log_p
    for given in (PICTURES, predictor.encode_tokens(PICTURES)):
        found = predictor.rerank(given, TEXTS, top, 0.3)
        for scores, cosines, at, values in (
            (to_text, cosine, found.texts, found.text_scores),
            (to_image.T, cosine.T, found.images, found.image_scores),
        ):
            assert at.shape == (len(scores), min(top, scores.shape[1]))
            for own, near, positions, got in zip(scores, cosines, at, values, strict=True):
                first = np.argsort(-near)[:top]
                expected = first[np.argsort(-own[first])]
                np.testing.assert_array_equal(positions, expected)
                np.testing.assert_allclose(got, own[expected], rtol=2e-5)
    one = predictor.rerank(PICTURES, TEXTS[1], top, 0.3)
    assert one.texts.tolist() == [[0]] * 4 and one.images.shape == (1, min(top, 4))


def test_what_rerank_refuses(predictor):  # noqa: F811
    with pytest.raises(InputError, match="rerank.json: no such file; give one"):
        predictor.rerank(PICTURES, TEXTS)
    for top in (0, 2.5, True):
        with pytest.raises(InputError, match=f"^top: got {top}, expected a whole number"):
            predictor.rerank(PICTURES, TEXTS, top, 1.0)
    for weight in (float("nan"), -1.0, float("inf")):
        with pytest.raises(InputError, match=f"^weight: got {weight}, expected a number of at"):
            predictor.rerank(PICTURES, TEXTS, 2, weight)
    with pytest.raises(InputError, match="got 1 image, expected 2 or more: the prior"):
        predictor.rerank(PICTURES[0], TEXTS, weight=1.0)
    silent = inference.Predictor(predictor.model, predictor.params)
    with pytest.raises(InputError, match="^rerank: the model has no text decoder"):
        silent.rerank(PICTURES, TEXTS, weight=1.0)


def run(kind, model, images, output, *words):
    given = ["--checkpoint", model, "--images", images[0], "--annotations", images[1]]
    words = [kind, *given, "--output", output, "--cache", "", *words]
    return evaluate.main(list(map(str, words)))


def test_the_commands(folder, images, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "r.json"
    assert run("retrieval", folder, images, output, "--rerank", "2") == 2
    assert "no weight is given" in capsys.readouterr().err
    assert run("retrieval", folder, images, output, "--rerank", "2", "--choose-weight") == 0
    stored = folder / "rerank.json"
    weight = json.loads(stored.read_text())["weight"]
    assert run("retrieval", folder, images, output, "--rerank", "2") == 0
    out, err = capsys.readouterr()
    assert "retrieval: image to text R@1, reranked" in out
    assert (
        f"retrieval: reranked 2 by weight {weight:g} of {stored}, chosen for the first 2 on {images[1]}"
        in err
    )
    got = json.loads(output.read_text())["reranked"]["text_to_image"]["r1"]
    # The method with the same weight, of the distinct captions.
    model = grain_jax.load(folder)
    best = model.rerank(PICTURES, TEXTS[:3], 2).images[:, 0]
    right = [{0, 3}, {1}, {2}]
    hits = [best[text] in right[text] for text in (0, 1, 2, 0)]
    assert got == pytest.approx(np.mean(hits))
    assert run("grounding", folder, images, output) == 0
    result = json.loads(output.read_text())
    boxes = [model.point(picture, "red beak").box_xyxy for picture in PICTURES]
    iou = [_iou(box, np.array([0, 0, 0.5, 0.75])) for box in boxes]
    assert result["point"]["phrase_iou"] == pytest.approx(np.mean(iou), abs=1e-6)
    regions = model.encode_regions(PICTURES).boxes_xyxy
    asked = [[["red beak"]] * regions.shape[1]] * 4
    log_p = np.array(model.description_log_likelihood(PICTURES, list(regions), asked))[..., 0]
    # Boxes of the same bins are equally likely.
    best = [r[np.isclose(p, p.max(), rtol=1e-5)] for r, p in zip(regions, log_p)]
    iou = [np.mean([_iou(box, np.array([0, 0, 0.5, 0.75])) for box in of]) for of in best]
    assert result["likelihood"]["phrase_iou"] == pytest.approx(np.mean(iou), abs=1e-6)
    # The model is another one, in the same folder.
    params = jax.tree.map(lambda x: x, model.params) | {
        "logit_scale": model.params["logit_scale"] * 2
    }
    other = inference.Predictor(
        model.model, params, folder=model.folder, text_decoder=model.text_decoder
    )
    assert other.digests["text_decoder"] == model.digests["text_decoder"]
    with pytest.raises(InputError, match="rerank.json: got the weight of another model"):
        other.rerank(PICTURES, TEXTS)
    stored.unlink()


def _iou(a, b):
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    area = lambda box: np.prod(np.maximum(box[2:] - box[:2], 0))
    return overlap / (area(a) + area(b) - overlap)


@pytest.fixture(scope="module")
def embedded(folder, images, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("search") / "out"
    words = [images[0], "--checkpoint", folder, "--output", out, "--threads", "2"]
    assert embed.main(list(map(str, words))) == 0
    return out


def found_by(text):
    """(id, score, log p or None) of each line of a table of search."""
    pattern = r"^ +\d+ +(-?\d\.\d+)  +(-?\d+\.\d\d)?  (\S+\.png)"
    return [
        (name, float(score), log_p and float(log_p))
        for score, log_p, name in re.findall(pattern, text, re.MULTILINE)
    ]


@pytest.mark.parametrize("by", ["regions", "images"])
def test_a_search_reads_the_first_images_again(embedded, predictor, by, capsys):  # noqa: F811
    words = [str(embedded), "--text", "long red beak", "--by", by, "--top", "4"]
    assert search_command.main([*words, "--rerank", "3", "--rerank-weight", "0.4"]) == 0
    out, err = capsys.readouterr()
    assert err.endswith("--rerank: 3 by weight 0.4, as given\n") and "log p" in out
    plain = search.search(search.Index(embedded), "long red beak", by=by, top=4)[0]
    expected = []
    for hit in plain[:3]:
        picture = PICTURES[int(hit.id[0])]
        if by == "images":
            log_p = predictor.caption_log_likelihood(picture, ["long red beak"])[0]
        else:
            box = hit.box_xyxy[None]
            asked = [["long red beak"]]
            log_p = predictor.description_log_likelihood(picture, box, asked)[0][0]
        expected.append((hit.id, hit.score, float(log_p)))
    expected.sort(key=lambda hit: -(predictor.logit_scale * hit[1] + 0.4 * hit[2]))
    got = found_by(out)
    assert [name for name, *_ in got] == [name for name, *_ in expected] + [plain[3].id]
    for (_, score, log_p), (_, score_2, log_p_2) in zip(got, expected):
        assert (score, log_p) == pytest.approx((score_2, log_p_2), abs=6e-3)
    assert got[3][2] is None or got[3][2] == ""
    # Fewer are shown than are reordered.
    assert search_command.main([*words[:-1], "1", "--rerank", "3", "--rerank-weight", "0.4"]) == 0
    assert [name for name, *_ in found_by(capsys.readouterr().out)] == [expected[0][0]]


def test_what_a_search_cannot_rerank_is_one_line(embedded, images, tmp_path, capsys):
    def fault(*words):
        assert search_command.main([str(embedded), *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    asked = ["--text", "a wren", "--rerank", "2"]
    assert "no weight is given" in fault(*asked, "--by", "images")
    for by in ((), ("--by", "regions")):
        line = "--rerank: the stored weight is of captions of whole images, and the search is by regions"
        assert fault(*asked, *by).startswith(line)
    picture = str(images[0] / "0.png")
    assert "--rerank: got --image, expected --text" in fault("--image", picture, "--rerank", "2")
    assert "expected --rerank 10" in fault("--text", "a wren", "--rerank-weight", "1")
    gone = ["--rerank-weight", "1", "--images", str(tmp_path)]
    assert re.match(
        r"--rerank: 2 of the 2 images that come first cannot be read: \d\.png: .*; give --images",
        fault(*asked, *gone),
    )
