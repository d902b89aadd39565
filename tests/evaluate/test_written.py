import dataclasses
import json
import math
import types

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

import grain_jax
from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.config import recipe, suite
from grain_jax.core import errors
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import cider, likelihood, tables, written
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import checkpoint
from tests import perturbed, tiny
from tests.evaluate.speaking import SpeakingStub
from tests.evaluate.stub import annotate, measure, region
from tests.evaluate.writer import Writer
from tests.inference.test_text_decoder import random_decoder, small_model, write_words

TEXTS = {"a red wing": [1, 0], "a blue wing": [0, 1], "a red tail": [0.6, 0.8], "": [0, 1]}
CAPTIONS = {0: "A bird with a red wing.", 1: "a bird with a blue wing, and a red tail", 2: "a cat"}
DESCRIPTIONS = {0: ["a red wing", ""], 1: ["A blue wing!"], 2: ["a blue wing"]}


@pytest.fixture
def next_image(monkeypatch):
    """Chance is of the next image of the file."""
    monkeypatch.setattr(written, "others_of", lambda count: np.roll(np.arange(count), -1))


@pytest.fixture
def data(tmp_path):
    """Three images of 20 x 10 pixels with captions and boxes, one that is missing, one without either."""
    left, right = [0, 0, 10, 10], [10, 0, 20, 10]
    lines = [
        {
            "captions": ["a bird with a red wing", "a red wing"],
            "regions": [
                region(left, "a red wing", 0.5),
                region(right, "a blue wing", 0.9),
                region([30, 0, 40, 9], "a red tail"),
            ],
        },
        {
            "caption": "a bird with a red tail",
            "regions": [region(left, "a blue wing")],
        },
        {
            "synthetic_caption": "two birds",
            "regions": [region(right, "a red tail"), region(left, "A red tail.")],
        },
        {"image": "none.png", "caption": "not there", "regions": [region(left, "a red wing")]},
        {"image": "1.png"},
    ]
    return annotate(tmp_path, lines)


def test_captions_by_hand(data, next_image, tmp_path):
    path = tmp_path / "P.jsonl"
    predictor = Writer(captions=CAPTIONS, beams=3)
    got = measure("captions", predictor, **data, beams=3, batch_size=2, predictions=path)
    assert (got["pictures"], got["unreadable"], got["without_caption"]) == (3, 1, 1)
    assert (got["captions"], got["caption_descriptions"], got["beams"]) == (4, 5, 3)
    assert got["caption_exact"] == pytest.approx(1 / 3)  # the first, but for its full stop
    # Held: a red wing; a blue wing; of the last image none of its one. Of the others: by the next line's caption.
    assert got["caption_parts"] == pytest.approx(2 / 5)
    assert got["reference_caption_parts"] == pytest.approx(1 / 5)
    assert got["chance_caption_exact"] == 0
    assert got["chance_caption_parts"] == pytest.approx(1 / 5)  # a red tail, of the first image
    references = [
        ["a bird with a red wing", "a red wing"],
        ["a bird with a red tail"],
        ["two birds"],
    ]
    scorer = cider.Scorer([[text.split() for text in own] for own in references])
    said = [cider.words(CAPTIONS[i]) for i in range(3)]
    assert got["caption_cider"] == pytest.approx(scorer(said).mean())
    assert got["caption_words"] == pytest.approx(np.mean([len(text) for text in said]))
    assert got["reference_caption_words"] == pytest.approx((6 + 6 + 2) / 3)
    others = ["a bird with a red tail", "two birds", "not there"]
    chance = scorer([text.split() for text in others]).mean()
    assert got["chance_caption_cider"] == pytest.approx(chance) and chance > 0
    # Each word costs 2 nats in its own image; each has a token, and the end is one more.
    words = [6, 3, 6, 2]
    assert got["caption_nll"] == pytest.approx(2 * sum(words) / sum(n + 1 for n in words))
    assert got["caption_perplexity"] == pytest.approx(math.exp(got["caption_nll"]))
    assert got["chance_caption_nll"] == pytest.approx(2 * (6 + 2 + 2) / (7 + 3 + 3))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["caption"] for line in lines] == list(CAPTIONS.values())
    assert lines[0]["references_log_p"] == [-12, -6] and lines[2]["references"] == ["two birds"]
    assert len(tables.rows_of(got["kind"], tables.scalars(got))) == 4
    json.dumps(got)


def test_descriptions_by_hand(data, next_image):
    predictor = Writer(texts=TEXTS | {"A blue wing!": [0, 2], "A red tail.": [3, 4]})
    predictor.descriptions = DESCRIPTIONS | {2: ["a blue wing", "a red tail"]}
    got = measure("descriptions", predictor, **data)
    assert (got["pictures"], got["boxes"], got["boxes_outside"]) == (3, 5, 1)
    # The boxes of the first image by their scores: a blue wing, of which it says a red wing; a red wing: nothing.
    assert got["description_exact"] == pytest.approx((0 + 0 + 1 + 0 + 1) / 5)
    assert got["description_cosine"] == pytest.approx((0 + 0 + 1 + 0.8 + 1) / 5)
    # The next image's: a blue wing twice; a red tail; a red wing twice.
    assert got["chance_description_exact"] == pytest.approx(1 / 5)
    assert got["chance_description_cosine"] == pytest.approx((1 + 0 + 0.8 + 0.6 + 0.6) / 5)
    # "A red tail." has a token more than words.
    assert got["description_nll"] == pytest.approx(2 * 15 / (5 * 4 + 1))
    assert got["chance_description_nll"] == pytest.approx(2 * 15 / (5 * 4))
    labels = [row.label for row in tables.rows_of(got["kind"], tables.scalars(got))]
    assert labels[0] == "exact descriptions" and len(labels) == 3
    json.dumps(got)


def test_a_box_with_several_descriptions_is_described_once(tmp_path, next_image):
    left, right = [0, 0, 10, 10], [10, 0, 20, 10]
    lines = [
        {
            "regions": [
                region(left, "a red wing"),
                region(right, "a blue wing"),
                region(left, "a red tail"),
            ]
        },
        {"regions": [region(left, "a blue wing"), region(left, "a red tail", 0.5)]},
    ]
    given = annotate(tmp_path, lines)
    predictor = Writer(texts=TEXTS)
    predictor.descriptions = {0: ["a red tail", "a red wing"], 1: ["a blue wing"]}
    path = tmp_path / "P.jsonl"
    got = measure("descriptions", predictor, **given, predictions=path)
    assert (got["boxes"], got["descriptions"]) == (3, 5)
    assert got["description_exact"] == pytest.approx(2 / 3)
    assert got["description_cosine"] == pytest.approx(((0.6 + 1) / 2 + 0 + (1 + 0.8) / 2) / 3)
    # Of the next image: a blue wing, a red tail; and a red wing.
    assert got["chance_description_exact"] == 0
    chance = (0 + 0.8) / 2 + 0.8 + (0 + 0.6) / 2
    assert got["chance_description_cosine"] == pytest.approx(chance / 3)
    assert got["description_nll"] == pytest.approx(2 * 15 / (5 * 4))
    first = json.loads(path.read_text().splitlines()[0])["regions"][0]
    assert first["references"] == ["a red wing", "a red tail"] and first["other"] == "a blue wing"


def test_other_images_are_one_cycle():
    for count in (1, 2, 7, 40):
        others = written.others_of(count)
        seen = [0]
        while others[seen[-1]] != 0:
            seen.append(int(others[seen[-1]]))
        assert sorted(seen) == list(range(count))
        assert np.array_equal(others, written.others_of(count))


POINTS = {
    (0, "beak"): [0, 0, 0.5, 1],
    (0, "tail"): [0, 0, 1, 1],
    (2, "tail"): [0.5, 0, 1, 1],
    # What an image is asked for the chance of another one.
    (1, "tail"): [0, 0, 0.5, 1],
    (1, "beak"): [0, 0, 0.5, 1],
    (2, "beak"): [0.5, 0, 1, 1],
}


@pytest.fixture
def phrases(tmp_path):
    """(options, a stub whose region decoder serves grounding): two beaks; a tail of both halves; one outside."""
    left, right, outside = [0, 0, 10, 10], [10, 0, 20, 10], [30, 0, 40, 9]
    lines = [
        {
            "regions": [region(left, "beak"), region(right, "tail"), region(left, "tail")],
            "phrases": [[0], [1, 2], [0]],
        },
        {"regions": [region(outside, "beak")]},
        {"regions": [region(right, "tail"), region(outside, "tail")]},
    ]
    regions = {i: ([[0, 0, 0.5, 1]], [[1, 0, 0]]) for i in range(3)}
    texts = {"beak": [1, 0, 0], "tail": [0, 1, 0]}
    of_boxes = {pair: [-1] for pair in POINTS}
    images = {i: [1, 0, 0] for i in range(3)}
    stub = SpeakingStub(images, texts, regions, points=POINTS, of_boxes=of_boxes)
    return annotate(tmp_path, lines), stub


def test_pointing_by_hand(phrases, next_image, tmp_path):
    given, stub = phrases
    path = tmp_path / "P.jsonl"
    got = measure("pointing", stub, **given, batch_size=2, predictions=path)
    assert (got["pictures"], got["phrases"], got["regions_outside"]) == (3, 4, 2)
    assert got["phrases_of_several_boxes"] == 1
    assert got["phrase_iou"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert got["phrase_acc50"] == 1 == got["phrase_acc50_any_box"]
    assert got["phrase_iou_merged_box"] == pytest.approx(1)
    # By the box of the same phrase in another image: the right half, thrice, and the left one.
    assert got["chance_phrase_iou"] == pytest.approx((0 + 1 + 0 + 0) / 4)
    assert got["chance_phrase_acc50"] == pytest.approx(1 / 4)
    assert got["chance_phrase_iou_merged_box"] == pytest.approx(0.5 / 4)
    first, second, _ = (json.loads(line) for line in path.read_text().splitlines())
    assert first["phrases"][1]["boxes"] == [[0.5, 0, 1, 1], [0, 0, 0.5, 1]]
    assert first["phrases"][1]["pointed"] == [0, 0, 1, 1] and second["phrases"] == []
    rows = tables.rows_of(got["kind"], tables.scalars(got))
    assert [row.label for row in rows][:2] == ["phrase to box IoU", "phrase to box Acc@0.5"]
    assert rows[0].chance == "chance_phrase_iou" and len(rows) == 4
    json.dumps(got)


def test_pointing_has_the_numbers_of_grounding(phrases):
    given, stub = phrases
    of_grounding = measure("grounding", stub, **given)["point"]
    got = measure("pointing", stub, **given)
    assert {key: got[key] for key in of_grounding} == of_grounding
    assert measure("pointing", stub, **given, batch_size=1) == got


def test_batches_do_not_matter(data):
    for kind in ("captions", "descriptions"):
        texts = TEXTS | {"A blue wing!": [0, 2], "A red tail.": [3, 4]}
        predictor = Writer(texts=texts, captions=CAPTIONS)
        predictor.descriptions = DESCRIPTIONS | {2: ["a blue wing", "a red tail"]}
        found = [measure(kind, predictor, **data, batch_size=size) for size in (1, 64)]
        assert found[0] == found[1]


def test_of_one_image_there_is_no_chance(tmp_path):
    given = annotate(tmp_path, [{"caption": "a cat"}])
    got = measure("captions", Writer(captions={0: "a cat"}), **given)
    assert got["caption_exact"] == 1 and "caption_parts" not in got
    assert not any(key.startswith("chance_") for key in got)


def test_faults_are_one_line(data, tmp_path):
    for kind in ("captions", "descriptions", "pointing"):
        without = Writer(has_text_decoder=False)
        with pytest.raises(InputError, match=f"^{kind}: the model has no text decoder, exp"):
            measure(kind, without, **data)
    predictor = Writer(captions={0: "x", 1: "x", 2: "x"}, cost=math.nan)
    with pytest.raises(InputError, match="not finite"):
        measure("captions", predictor, **data)
    folder = tmp_path / "outside"
    folder.mkdir()
    outside = annotate(folder, [{"regions": [region([30, 0, 40, 9], "a red wing")]}])
    with pytest.raises(errors.UserError, match=r"A.jsonl: every box lies outside its image$"):
        measure("descriptions", Writer(descriptions={0: []}), **outside)
    with pytest.raises(errors.UserError, match="A.jsonl: no phrase has a box that lies in its"):
        measure("pointing", SpeakingStub(), **outside)
    with pytest.raises(errors.UserError, match="no line has a caption"):
        measure("captions", Writer(), **outside)


def test_a_run_without_a_text_decoder_is_told_before_it_starts():
    c = tiny.dictionary()
    c.evals.said = recipe.evaluator("captions", "x", annotations="A.jsonl")
    expected = (
        "evals.said: got kind=captions, which needs a text decoder, expected a term text_decoder in"
    )
    with pytest.raises(config_lib.ConfigError, match=expected):
        config_lib.from_dict(c)
    c.loss.terms.words = {"term": "text_decoder", "weight": 1.0}
    assert config_lib.from_dict(c).evals["said"].needs_text_decoder


def test_the_suite_has_them_for_models_that_write():
    found = suite.written(folders="D")
    assert found["mscoco_captions"]["annotations"] == "D/mscoco/A.jsonl"
    assert found["mscoco_captions"]["kind"] == "captions" and found["mscoco_captions"]["beams"] == 1
    assert found["refcoco_testA_descriptions"]["images"] == "D/pictures/coco/train2014"
    entries = [config_lib.evaluator_from_dict(ConfigDict(entry)) for entry in found.values()]
    kinds = {"captions", "descriptions", "pointing", "retrieval"}
    assert {entry.kind for entry in entries} == kinds
    assert all(entry.needs_text_decoder for entry in entries)
    assert found["refcoco_testB_pointing"]["annotations"] == "D/refcoco_testB/A.jsonl"
    assert found["flickr30k_reranked"]["rerank"] == 10
    assert all(entry.missing == "skip" and "--source" in str(entry.get) for entry in entries)


def test_log_probabilities_are_numbers_of_python(data):
    predictor = Writer(captions=CAPTIONS)
    predictor.number = np.float32
    json.dumps(measure("captions", predictor, **data))


def test_of_a_text_that_is_cut_the_end_is_not_counted():
    predictor = Writer()
    sizes = dataclasses.replace(predictor.text_decoder.config, row_length=16)
    predictor.text_decoder = predictor.text_decoder._replace(config=sizes)
    texts = ["a bird", " ".join("a" * 15), " ".join("a" * 16)]
    assert likelihood.token_counts(predictor, texts, "caption").tolist() == [3, 16, 15]
    assert likelihood.token_counts(predictor, texts, "describe").tolist() == [3, 11, 11]


def test_in_training_the_predictor_has_the_text_decoder_of_the_run():
    c = tiny.dictionary()
    c.loss.terms.update(
        words={"term": "text_decoder", "weight": 1.0, "width": 8, "heads": 2},
        pooled={"term": "text_pooled", "weight": 1.0},
    )
    config = config_lib.from_dict(c)
    of_model = {"logit_scale": np.float32(1)}
    params = of_model | {"terms": {"words": {"decoder": {"head": np.float32(2)}}, "pooled": {}}}
    state = types.SimpleNamespace(params=params, ema_params=None)
    found = train.make_predictor(config, state)  # pyright: ignore[reportArgumentType]
    assert found.has_text_decoder and "terms" not in found.params
    assert found.text_decoder is not None and float(found.text_decoder.params["head"]) == 2
    sizes = found.text_decoder.config
    assert (sizes.width, sizes.mlp_dim, sizes.depth) == (
        8,
        32,
        max(1, config.model.text.depth // 2),
    )
    average = of_model | {"terms": {"words": {"decoder": {"head": np.float32(3)}}}}
    state.ema_params = average
    found = train.make_predictor(config, state)  # pyright: ignore[reportArgumentType]
    assert found.text_decoder is not None and float(found.text_decoder.params["head"]) == 3
    state = types.SimpleNamespace(params=of_model, ema_params=None)
    assert not train.make_predictor(config, state).has_text_decoder  # pyright: ignore


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A saved model of random parameters with a text decoder."""
    folder = tmp_path_factory.mktemp("model")
    model = small_model()
    checkpoint.save_model(
        folder, model, perturbed.params(model), random_decoder(model), source="test"
    )
    write_words(folder)
    return folder


def test_two_towers_are_measured_on_pointing(real, tmp_path):
    """They have no regions, so `grounding` refuses them."""
    model = dataclasses.replace(small_model(), decoder=None)
    decoder = random_decoder(model)
    towers = grain_jax.inference.Predictor(
        model, perturbed.params(model), folder=real, text_decoder=decoder
    )
    given = annotate(tmp_path, [{"regions": [region([0, 0, 10, 10], "red beak")]}] * 2)
    with pytest.raises(InputError, match="two towers and no region decoder"):
        measure("grounding", towers, **given)
    got = measure("pointing", towers, **given)
    images = [PIL.Image.open(tmp_path / f"{i}.png") for i in range(2)]
    found = [own[0].box_xyxy for own in towers.point(images, [["red beak"]] * 2)]
    iou = [_iou(box, np.array([0, 0, 0.5, 1])) for box in found]
    assert got["phrase_iou"] == pytest.approx(np.mean(iou), abs=1e-6)
    assert got["chance_phrase_iou"] == pytest.approx(np.mean(iou), abs=1e-6)  # of equal boxes


def test_the_commands_of_a_model(real, tmp_path, capsys):
    """Against the methods of the model, text by text."""
    negatives = ["a beak", "red"]
    lines = [
        {
            "caption": "a long wren",
            "regions": [region([0, 0, 10, 10], "long", negatives=negatives)],
        },
        {
            "caption": "red beak",
            "regions": [region([5, 0, 20, 8], "red beak", negatives=["a", "b"])],
        },
    ]
    given = annotate(tmp_path, lines)

    def run(kind, *flags):
        flags = ["--checkpoint", str(real), "--cache", "", "--batch-size", "2", *flags]
        flags += [f"--{key}={value}" for key, value in given.items()]
        assert command.main([kind, *flags, "--output", str(tmp_path / "out.json")]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    predictor = grain_jax.load(real)
    images = [PIL.Image.open(tmp_path / f"{i}.png") for i in range(2)]
    boxes = [np.array([[0, 0, 0.5, 1]]), np.array([[0.25, 0, 1, 0.8]])]
    got = run("captions", "--predictions", str(tmp_path / "P.jsonl"))
    texts = ["a long wren", "red beak"]  # each image's own, and the other one's
    log_p = predictor.caption_log_likelihood(images, [texts, texts[::-1]])
    assert got["caption_nll"] == pytest.approx(-sum(x[0] for x in log_p) / (4 + 3), rel=1e-5)
    said = [json.loads(line) for line in (tmp_path / "P.jsonl").read_text().splitlines()]
    assert [x["caption"] for x in said] == [x.text for x in predictor.caption(images)]

    got = run("descriptions")
    texts = ["long", "red beak"]
    log_p = predictor.description_log_likelihood(images, boxes, [[texts], [texts[::-1]]])
    assert got["description_nll"] == pytest.approx(-sum(x[0][0] for x in log_p) / 5, rel=1e-5)
    texts = [own[0].text for own in predictor.describe(images, boxes)]
    pairs = zip(predictor.encode_text(texts), predictor.encode_text(["long", "red beak"]))
    assert got["description_cosine"] == pytest.approx(np.mean([x @ y for x, y in pairs]), abs=1e-5)

    got = run("pointing", "--beams", "2")
    pointed = predictor.point(images, [["long"], ["red beak"]], beams=2)
    pairs = [(own[0].box_xyxy, box) for own, box in zip(pointed, boxes)]
    iou = [_iou(a, b[0]) for a, b in pairs]
    assert got["phrase_iou"] == pytest.approx(np.mean(iou), abs=1e-6)
    by_chance = [_iou(a, boxes[1 - i][0]) for i, (a, _) in enumerate(pairs)]
    assert got["chance_phrase_iou"] == pytest.approx(np.mean(by_chance), abs=1e-6)
    assert predictor.point(images, [[], []]) == [[], []]

    got = run("hard-negatives", "--negatives", "2", "--captions")
    asked = [["long", *negatives], ["red beak", "a", "b"]]
    log_p = predictor.description_log_likelihood(images, boxes, [[x] for x in asked])
    best = [own[0].argmax() == 0 for own in log_p]
    assert got["likelihood"]["top1"] == np.mean(best)
    asked = [["a long wren", "a a beak wren", "a red wren"], ["red beak", "a", "b"]]
    best = [x.argmax() == 0 for x in predictor.caption_log_likelihood(images, asked)]
    assert got["captions"]["boxes"] == 2 and got["captions"]["likelihood"]["top1"] == np.mean(best)
    table = capsys.readouterr().out
    assert "pointing: phrase to box Acc@0.5" in table
    assert "captions: CIDEr-D of captions" in table and "right caption, by the likelihood" in table


def _iou(a, b):
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    area = lambda box: np.prod(box[2:] - box[:2])
    return overlap / (area(a) + area(b) - overlap)
