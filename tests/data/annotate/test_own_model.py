"""A model of grain_jax as the annotator: which boxes it describes, their scores, the identity of the set."""

import json
import math

import numpy as np
import pytest

from grain_jax.core import annotations, schema
from grain_jax.data import build
from grain_jax.data.annotate import __main__ as command
from grain_jax.data.annotate import answers, own_model
from grain_jax.data.annotate.arguments import Annotate
from grain_jax.inference import Tokens
from grain_jax.inference.text_decoder import Written
from grain_jax.models import text_decoder
from grain_jax.runtime import checkpoint
from tests import perturbed, record_sets
from tests.inference import test_text_decoder

SIZE = (40, 30)  # of the images, in pixels
QUERIES = np.array(  # float32 [Q, 4]: the second overlaps the first, the last reaches over the edge
    [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0.2, 0.2, 0.4, 0.4], [0.75, 0.5, 1.25, 1]],
    np.float32,
)  # fmt: skip


class FakePredictor:
    """Says of an image its number, of a box its left edge; counts what it is asked."""

    folder, model, params = "/models/own", None, None
    digests: dict[str, str]

    def __init__(self, has_text_decoder=True, has_regions=True):
        self.has_text_decoder, self.has_regions = has_text_decoder, has_regions
        self.seen, self.beams, self.cut = [], set(), ""

    def encode_tokens(self, images):
        assert all(image.shape == (*SIZE[::-1], 3) for image in images)
        numbers = [int(image[0, 0, 0]) for image in images]
        self.seen.append(numbers)
        return Tokens(np.array(numbers))

    def encode_regions(self, tokens):
        boxes = np.repeat(QUERIES[None], len(tokens.values), axis=0)
        return schema.Regions(boxes, np.zeros((*boxes.shape[:2], 2), np.float32))

    def caption(self, tokens, beams):
        self.beams.add(beams)
        texts = (" \n" if n == 1 else f" a  picture of {n}\n" for n in tokens.values)
        return [Written(text, -1.5, text != self.cut) for text in texts]

    def describe(self, tokens, boxes_xyxy, beams):
        self.beams.add(beams)
        found = []
        for number, boxes in zip(tokens.values, boxes_xyxy, strict=True):
            assert boxes.min(initial=0) >= 0 and boxes.max(initial=1) <= 1
            lefts = (int(100 * float(box[0]) + 0.01) for box in boxes)
            texts = [(f"part {left} of {number}", -left / 10) for left in lefts]
            found.append([Written(text, p, text != self.cut) for text, p in texts])
        return found


@pytest.fixture
def model(monkeypatch):
    found = FakePredictor()
    monkeypatch.setattr(own_model, "load", lambda *_: found)
    found.digests = {"params": "0123456789abcdef", "text_decoder": "fedcba9876543210"}
    return found


@pytest.fixture
def pictures(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 5, size=SIZE)
    return tmp_path / "in"


def annotate(pictures, output, *more, status=0):
    """Runs the command; the lines of A.jsonl."""
    source = ["--source=annotations", f"--annotations={pictures / 'A.jsonl'}"]
    given = [f"--images={pictures}", f"--output={output}", *source, "--model=runs/own", *more]
    assert command.main(given) == status
    return [json.loads(line) for line in (output / "A.jsonl").read_text().splitlines()]


def regions(line):
    return [(tuple(r["box"]), r["description"], round(r["score"], 6)) for r in line["regions"]]


def score(left):
    """Of the text of four words with log-probability -left / 10."""
    return round(math.exp(-left / 50), 6)


def of_queries(number):
    """What stays of QUERIES: one of the two that overlap, all within the image, best first."""
    boxes = {0: (0, 0, 20, 15), 20: (8, 6, 16, 12), 50: (20, 15, 40, 30), 75: (30, 15, 40, 30)}
    return [(boxes[x], f"part {x} of {number}", score(x)) for x in (0, 20, 50)] + (
        [(boxes[75], f"part 75 of {number}", score(75))]
    )


def test_texts_that_were_cut_are_refused(model, pictures, tmp_path):
    model.cut = "part 20 of 0"
    options = ["--threshold=0", "--max-faults=0.5", "--shard-size=3"]
    (first, *_), all_of = annotate(pictures, tmp_path / "out", *options), of_queries(0)
    assert [r[1] for r in regions(first)] == [r[1] for r in all_of if r[1] != model.cut]
    refused = answers.parse_text(" a\n picture", cut_off=True)
    assert refused == answers.Refused(answers.CUT_OFF, "'a picture'")


def test_given_boxes_are_described_anew_and_queries_where_there_are_none(
    model, pictures, tmp_path, capsys
):
    lines = annotate(
        pictures, tmp_path / "out", "--threshold=0", "--max-faults=0.2", "--shard-size=3"
    )
    source = [json.loads(line) for line in (pictures / "A.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [line["image"] for line in source]
    for number, (line, given) in enumerate(zip(lines, source)):
        assert line["captions"] == [given["caption"], *given["captions"]]
        # The second image had no words: it keeps what it has, and is named.
        expected = given["synthetic_caption"] if number == 1 else f"a picture of {number}"
        assert line["synthetic_caption"] == expected
        if number % 4 == 0:
            assert [r[1:] for r in regions(line)] == [r[1:] for r in of_queries(number)]
            boxes = [r[0] for r in regions(line)]
            np.testing.assert_allclose(boxes, [r[0] for r in of_queries(number)], atol=1e-5)
            continue
        for region, old in zip(regions(line), given["regions"], strict=True):
            left = int(100 * old["box"][0] / SIZE[0] + 0.01)
            assert region == (tuple(old["box"]), f"part {left} of {number}", score(left))
    letter = json.loads((tmp_path / "out" / "failed.jsonl").read_text())
    assert (letter["image"], letter["stage"], letter["cause"], letter["kept"]) == (
        "00001.png", "caption", "empty answer", True,
    )  # fmt: skip
    # The image tower runs once for both passes.
    assert sorted(model.seen) == [[0, 1, 2], [3, 4]] and model.beams == {1}
    assert annotate(
        pictures, tmp_path / "out", "--threshold=0", "--max-faults=0.2", "--shard-size=3"
    )
    assert len(model.seen) == 2 and "0 of 2 shards in this run" in capsys.readouterr().out


def test_a_given_box_outside_the_image_is_left_out(model):
    boxes = [(0, 0, 20, 15), (60, 0, 70, 10), (30, 0, 48, 10), (30, 0, 60, 10)]  # of SIZE
    given = [annotations.Region(box, "old", 1.0) for box in boxes]
    parsed = Annotate(images="x", output="y", source="annotations", model="runs/own", boxes="given")
    own = own_model.OwnModel(parsed)
    (found,) = own.describe([(record_sets.picture(3, SIZE), given)])
    assert [region.box_xyxy for region in found.regions] == [boxes[0], boxes[2]]
    assert [line.cause for line in found.left_out] == ["box outside"] * 2
    assert found.left_out[0].detail == "[60, 0, 70, 10] of 40 x 30"


@pytest.mark.parametrize("boxes", ["given", "queries", "missing"])
def test_which_boxes(model, pictures, tmp_path, boxes):
    more = ["--passes=describe", f"--boxes={boxes}", "--threshold=0.4", "--regions=2", "--beams=3"]
    lines = annotate(pictures, tmp_path / "out", *more)
    assert model.beams == {3}
    for number, line in enumerate(lines):
        assert line["synthetic_caption"] == f"synthetic text of {number}"
        count = number % 4
        if boxes == "given":
            assert len(line["regions"]) == count
        elif boxes == "queries" or not count:
            assert [r[1:] for r in regions(line)] == [r[1:] for r in of_queries(number)[:2]]
        else:  # as they were
            old = record_sets.annotation(number, SIZE)["regions"]
            assert regions(line) == [
                (tuple(r["box"]), r["description"], round(r["score"], 6)) for r in old
            ]
    # A box whose description has a score of exp(-50 / 50) is below the threshold, a given one stays.
    kept = [r[1] for line in lines for r in regions(line) if r[1].startswith("part 50")]
    assert bool(kept) == (boxes == "given")


def test_the_set_names_the_model(model, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--max-faults=0.2", "--passes=caption,describe,negatives", "--name=own"]
    annotate(pictures, out, *more)
    named = {"model": "/models/own", "beams": 1, "dtype": "float32"}
    named["digests"] = {"params": "0123456789abcdef", "text_decoder": "fedcba9876543210"}
    boxes = {"boxes": None, "regions": 10, "threshold": 0.3}
    expected = {"caption": named, "describe": named | boxes}
    noted = json.loads((out / "records/own/1.0.0/metadata.json").read_text())["annotated_by"]
    assert [one["annotations"] for one in noted] == [str(out / "A.jsonl")]
    settings = json.loads((out / "summary.json").read_text())["settings"]
    for found in (settings, noted[0]["passes"]):
        assert {name: found[name] for name in expected} == expected
        assert found["negatives"]["negatives"] == 10
    # Of a set of two annotated files each names its model.
    other = tmp_path / "other"
    model.digests = {"params": "2"}
    annotate(pictures, other, "--max-faults=0.2", "--passes=describe")
    lines = (other / "A.jsonl").read_text()
    (other / "A.jsonl").write_text(lines.replace('"id": "id', '"id": "other'))
    both = [f"--annotations={x / 'A.jsonl'}" for x in (out, other)]
    built = tmp_path / "built"
    given = [f"--images={pictures}", f"--output={built}", "--name=two", "--source=annotations"]
    assert build.main([*given, *both]) == 0
    noted = json.loads((built / "two/1.0.0/metadata.json").read_text())["annotated_by"]
    digests = [one["passes"]["describe"]["digests"]["params"] for one in noted]
    assert digests == ["0123456789abcdef", "2"]
    # Another state of the model is another annotator.
    model.digests = {"params": "0"}
    annotate(pictures, out, *more, status=2)
    assert 'was begun with caption digests {"params": "0123' in capsys.readouterr().err


def test_a_stored_model_annotates_as_its_predictor_says(tmp_path):
    folder, pictures = tmp_path / "model", tmp_path / "in"
    model = test_text_decoder.small_model()
    decoder = test_text_decoder.random_decoder(model)
    bias, end = decoder.params["norm"]["bias"], text_decoder.vocabulary(decoder.config, model).end
    decoder.params["head"][end] += (
        2.5 * bias / (bias @ bias)
    )  # 2.5 more for the end: texts are whole
    checkpoint.save_model(folder, model, perturbed.params(model), decoder, source="test")
    test_text_decoder.write_words(folder)
    record_sets.write_annotations(pictures, 4, size=SIZE)
    given = [f"--images={pictures}", f"--output={tmp_path / 'out'}", "--threshold=0"]
    given += ["--source=annotations", f"--annotations={pictures / 'A.jsonl'}", "--max-faults=1"]
    assert command.main([*given, f"--model={folder}", "--boxes=given"]) == 0
    predictor = own_model.load(str(folder), "float32")
    images = [np.asarray(record_sets.picture(number, SIZE)) for number in range(4)]
    old = [record_sets.annotation(number, SIZE)["regions"] for number in range(4)]
    boxes = [np.array([r["box"] for r in of], np.float32).reshape(-1, 4) for of in old]
    captions = predictor.caption(images)
    described = predictor.describe(images, [x / (*SIZE, *SIZE) for x in boxes])
    lines = map(json.loads, (tmp_path / "out" / "A.jsonl").read_text().splitlines())
    scores = []
    for number, line in enumerate(lines):
        text = " ".join(captions[number].text.split()) if captions[number].is_whole else ""
        assert line["synthetic_caption"] == (text or f"synthetic text of {number}")
        expected = [
            (r["box"], written.text, math.exp(written.log_probability / (len(words) + 1)))
            for r, written in zip(old[number], described[number], strict=True)
            if (words := written.text.split()) and written.is_whole
        ]
        found = [(r["box"], r["description"], r["score"]) for r in line["regions"]]
        assert [x[:2] for x in found] == [x[:2] for x in expected]
        np.testing.assert_allclose([x[2] for x in found], [x[2] for x in expected], rtol=1e-5)
        scores += [x[2] for x in found]
    assert scores and np.ptp(scores) > 1e-3
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["describe"]
    assert settings["model"] == str(folder)
    assert settings["digests"] == json.loads((folder / "config.json").read_text())["digests"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--model runs/own: the model has no text decoder, expected one that was trained with"),
        ("--boxes=queries", "--boxes queries: --model runs/own has no region queries, expected"),
        ("--boxes=all", "--boxes: got 'all', expected one of"),
        ("--passes=all,ground", "--passes: got ground with --model, whose pass describe has boxes"),
        ("--passes=captions", "got 'captions', expected all, none, or some of caption,describe"),
        ("--chat=x", "--model: got --chat too, expected one of them"),
        ("--endpoint=http://127.0.0.1:1", "--model: got --endpoint too"),
        ("--boxes=given", "none of 1 images has a described box, expected regions"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(model, tmp_path, capsys, given, expected):
    folder = tmp_path / "bare"
    record_sets.write_annotations(folder, 1, size=SIZE)
    model.has_text_decoder, model.has_regions = bool(given), False
    words = [f"--images={folder}", f"--output={tmp_path / 'out'}", "--source=folder"]
    assert command.main([*words, "--model=runs/own", *given.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and expected in said[0]


def test_flags_of_the_model_need_it(tmp_path, capsys):
    given = [f"--images={tmp_path}", f"--output={tmp_path / 'out'}", "--boxes=queries"]
    assert command.main(given) == 2
    assert capsys.readouterr().err.strip().endswith("expected the one that describes them")


def test_a_pass_of_boxes_is_not_grounded(model, pictures, tmp_path, capsys):
    annotate(pictures, tmp_path / "out", "--passes=describe")
    source = ["--source=annotations", f"--annotations={pictures / 'A.jsonl'}"]
    ground = [f"--images={pictures}", f"--output={tmp_path / 'out'}", *source, "--passes=ground"]
    assert command.main(ground) == 2
    assert "its pass describe was of --model and has boxes" in capsys.readouterr().err


def test_memory_that_runs_out_halves_the_batch_and_a_bad_image_is_named(
    model, pictures, tmp_path, monkeypatch
):
    encode = model.encode_tokens

    def small(images):
        if len(images) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return encode(images)

    monkeypatch.setattr(model, "encode_tokens", small)
    (pictures / "00003.png").write_bytes(b"no picture")
    lines = annotate(pictures, tmp_path / "out", "--passes=describe", "--max-faults=0.2")
    assert len(lines) == 4 and sum(model.seen, []) == [0, 1, 2, 4]
    letter = json.loads((tmp_path / "out" / "failed.jsonl").read_text())
    assert (letter["image"], letter["cause"], letter["kept"]) == ("00003.png", "unreadable", False)
