"""examples/scenes: captions, what test scenes hold out, boxes and masks; the evaluator of groups, by hand."""

import json
import random
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.evaluator import groups
from examples.scenes import __main__ as scenes
from examples.scenes import things
from tests.evaluate.stub import StubPredictor, annotate

PHRASES = ("A red apple.", "A green apple.", "A pear.", "An owl.", "A crow.", "A cat.", "A dog.")
FRUIT = {"red_apple", "green_apple", "pear"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of some scenes of coloured discs."""
    folder, rng = tmp_path_factory.mktemp("scenes"), random.Random(0)
    for phrase in (*PHRASES, *(f"A thing{chr(97 + i)}." for i in range(9))):
        name = "_".join(phrase.strip(".").lower().split()[1:])
        path = folder / "cutouts" / ("fruit" if name in FRUIT else "other") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGBA", (60, 40))
        colour = (*(rng.randrange(256) for _ in "rgb"), 255)
        ImageDraw.Draw(image).ellipse((5, 5, 45, 35), fill=colour)
        image.save(path)
        path.with_suffix(".txt").write_text(f"{phrase}\nfr.utf8=x\n")
    (folder / "places").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (50, 70, 3), np.uint8)
        Image.fromarray(noise).save(folder / "places" / f"{i}.jpg")
    (folder / "kinds.json").write_text('{"fruit": "a fruit"}')
    arguments = ["--least-colours=1", "--train=40", "--test=8", "--quiet=2", "--size=48"]
    arguments += ["--objects=1,3"]
    arguments += [f"--{x}={folder / x}" for x in ("cutouts", "places")]
    arguments += [f"--kinds={folder / 'kinds.json'}", f"--output={folder / 'out'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scenes", *arguments])
        patch.setattr(scenes, "PAIRS_HELD_OUT", 0.6)
        scenes.main()
    return folder / "out"


def _lines(written, split):
    return [json.loads(x) for x in (written / split / "A.jsonl").read_text().splitlines()]


def test_quiet_phrases_are_in_region_descriptions_alone(written):
    quiet = list(json.loads((written / "quiet.json").read_text()))
    assert quiet == ["a green apple", "a red apple"] or quiet == ["a pear"]  # one head noun
    lines = _lines(written, "train")
    texts = " ".join(x["caption"] + " " + x["synthetic_caption"] for x in lines)
    described = {r["description"] for x in lines for r in x["regions"]}
    assert not any(phrase in texts for phrase in quiet) and "a fruit" in texts
    assert described >= set(quiet) and len(lines) == 40
    assert len(list((written / "quiet" / quiet[0]).iterdir())) == scenes.IMAGES_PER_CLASS


def test_a_group_differs_in_one_thing_and_shows_a_pair_that_training_does_not(written):
    named = lambda line: [r["description"] for r in line["regions"]]
    shown = [set(named(line)) for line in _lines(written, "train")]
    lines = _lines(written, "test")
    for group in (lines[:4], lines[4:]):
        first, *others = map(named, group)
        assert len({x[0] for x in (first, *others)}) == 4
        assert all(x[1:] == first[1:] for x in others)
        assert [x["regions"][1]["box"] for x in group] == [group[0]["regions"][1]["box"]] * 4
        for x in (first, *others):
            assert not any({x[0], x[1]} <= scene for scene in shown), x
    assert len(lines) == 8


def test_boxes_are_those_of_the_masks(written):
    names = (written / "test/classes.txt").read_text().splitlines()
    instances = json.loads((written / "test/instances.json").read_text())
    for number, line in enumerate(_lines(written, "test")):
        mask = np.asarray(Image.open(written / f"test/masks/{number:06}.png"))
        own = [x for x in instances["annotations"] if x["image_id"] == number]
        for region, instance in zip(line["regions"], own, strict=True):
            rows, columns = np.nonzero(mask == names.index(region["description"]))
            x1, y1, x2, y2 = region["box"]
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(found, region["box"], atol=3)  # soft edges, overlaps
            assert instance["bbox"] == [x1, y1, x2 - x1, y2 - y1]


def test_head_nouns():
    heads = {"a bunch of grapes": "grape", "a box for trash": "box", "a Tamworth pig": "pig"}
    heads |= {"a pair of pliers": "plier", "a cup of espresso coffee": "coffee", "Mars": "mar"}
    assert {phrase: things.head_of(phrase) for phrase in heads} == heads
    assert things.phrase_of("A peacock (a male peafowl). It is large.") == "a peacock"
    assert things.phrase_of("Mars—the red planet.") == "Mars"


def test_groups_by_hand(tmp_path):
    lines = [{"caption": f"t{i}"} for i in range(4)]
    options = annotate(tmp_path, lines)
    embeds = {0: [1, 0, 0, 0], 1: [0, 1, 0, 0], 2: [1, 0, 0, 0], 3: [0, 0, 0, 1]}
    texts = {f"t{i}": np.eye(4)[i].tolist() for i in range(4)}
    result = groups.Groups(**options).evaluate(StubPredictor(embeds, texts))
    assert result["image_to_text"] == 0.75  # image 2 says t0
    assert result["text_to_image"] == pytest.approx((0.5 + 1 + 0.25 + 1) / 4)  # two ties
    assert result["chance"] == 0.25
