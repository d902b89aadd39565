"""What the page shows, what it starts with, and the page in a browser."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.checkpoint import files, pretrained, saved_model
from grain_jax.core import errors
from grain_jax.demo import __main__ as command
from grain_jax.demo import class_lists
from tests import tiny
from tests.evaluate.report import workdirs
from tests.paths import ROOT

pytest.importorskip("gradio")
from grain_jax.demo import page  # noqa: E402

CLASSES = {"wren": ["a short tail", "a brown <b>back</b>"], "kite": ["a forked tail"]}
TEXT = class_lists.format(CLASSES)


@pytest.fixture(scope="module")
def predictor():
    c = tiny.config(model__boxes__kind="roi_align", loss__box_description=1.0)
    return inference.Predictor(c.model, workdirs.parameters(c.model))


@pytest.fixture(scope="module")
def two_towers():
    c = tiny.dictionary()
    c.model.decoder, c.model.image.pool, c.input.max_regions = None, "map", 0
    model = config_lib.from_dict(c).model
    return inference.Predictor(model, workdirs.parameters(model))


@pytest.fixture
def picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    return str(tmp_path / "noise.png")


@pytest.mark.quick
def test_scores_are_those_of_classify(predictor, picture):
    views, image = page.Views(predictor), PIL.Image.open(picture)
    for alpha in (0.0, 0.5, 1.0):
        rows, (shown, boxes) = views.scores(picture, TEXT, alpha)
        expected = predictor.classify(image, CLASSES, alpha)
        order = np.argsort(-expected)
        assert [row[0] for row in rows] == [list(CLASSES)[c] for c in order]
        assert [row[1] for row in rows] == pytest.approx(expected[order].tolist(), abs=1e-4)
        assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2)
    assert shown.size == (480, 360) and len(boxes) == 5  # a small image is shown larger
    regions = predictor.encode_regions(image)
    assert boxes[0][0] == tuple(np.rint(regions.boxes_xyxy[0] * [480, 360, 480, 360]).astype(int))
    texts = sum(CLASSES.values(), [])
    cosines = regions.embed @ predictor.encode_text(texts).T
    assert [label for _, label in boxes] == [
        f"region {q}: {texts[row.argmax()]} ({row.max():.2f})" for q, row in enumerate(cosines, 1)
    ]
    rows, (_, boxes) = views.scores(picture, "wren\nkite", 0.0)  # names alone: the whole image
    whole = sorted(predictor.classify(image, list(CLASSES)), reverse=True)
    assert [row[1] for row in rows] == pytest.approx(whole, abs=1e-4)
    assert boxes[4][1] == "region 5"


def test_phrases_and_pixels_are_those_of_the_model(predictor, picture):
    views, image = page.Views(predictor), PIL.Image.open(picture)
    (_, boxes), maps = views.find(picture, "a beak; a tail")
    answers = predictor.ground(image, ["a beak", "a tail"])
    phrases = ("a beak", "a tail")
    assert [label for _, label in boxes] == [f"{w} ({x.score:.2f})" for w, x in zip(phrases, answers)]
    assert [(mask.size, label) for mask, label in maps] == [((40, 30), word) for word in phrases]
    _, masks = views.segment(picture, "wren\nkite")
    labels = predictor.segment(image, ["wren", "kite"])
    for mask, name in masks:
        np.testing.assert_array_equal(mask, labels == ["wren", "kite"].index(name))
    assert sum(mask.sum() for mask, _ in masks) == labels.size


def test_a_model_without_regions_has_scores_and_maps(two_towers, picture):
    views = page.Views(two_towers)
    rows, regions = views.scores(picture, TEXT, 0.5)
    assert regions is None and len(rows) == 2
    boxed, maps = views.find(picture, "a tail")
    assert boxed is None and len(maps) == 1 and views.has_maps


def test_wrong_input_is_one_line(predictor, tmp_path, picture):
    views = page.Views(predictor)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for said, call in {
        "no image; drop one": lambda: views.scores(None, TEXT, 1.0),
        "known image format": lambda: views.scores(str(tmp_path / "broken.png"), TEXT, 1.0),
        "got 0 texts": lambda: views.scores(picture, " \n", 1.0),
        "got 'wren' twice": lambda: views.scores(picture, "wren\nwren", 1.0),
        "of 501 characters": lambda: views.find(picture, "a" * 501),
        "got 5001 texts": lambda: views.segment(picture, "\n".join(map(str, range(5001)))),
        "'kite' has no description": lambda: views.scores(picture, "wren: a tail\nkite", 1.0),
    }.items():
        with pytest.raises(errors.UserError, match=said) as fault:
            call()
        assert "\n" not in str(fault.value)
    with pytest.raises(page.gr.Error) as fault:  # toasts may hold HTML
        page._shown(views.scores)(picture, "<b>\n<b>", 1.0)
    assert "&lt;b&gt;" in fault.value.message and "<b>" not in fault.value.message


@pytest.mark.quick
def test_classes_of_a_file_and_of_a_run(tmp_path, monkeypatch):
    assert class_lists.parse(TEXT) == CLASSES
    (tmp_path / "names.txt").write_text("wren\n\nkite\n")
    assert class_lists.read(tmp_path / "names.txt") == {"wren": [], "kite": []}
    (tmp_path / "D.json").write_text(json.dumps(CLASSES))
    assert class_lists.read(tmp_path / "D.json") == CLASSES
    (tmp_path / "100" / "state").mkdir(parents=True)
    for first, second, expected in (
        ({"kind": "retrieval"}, {"descriptions": f"{tmp_path}/D.json"}, CLASSES),
        ({"descriptions": "gone.json"}, {"descriptions": f"{tmp_path}/D.json"}, CLASSES),
        # Another file of a stranger's config is not shown.
        ({"descriptions": f"{tmp_path}/names.txt"}, {"descriptions": "gs://x/D.json"}, {}),
    ):
        stored = files.Items({}, {"evals": {"a": first, "b": second}}, [], None)
        monkeypatch.setattr(files, "read_items", lambda folder, stored=stored: stored)
        assert class_lists.evaluated(tmp_path / "100") == (expected, None)
    assert class_lists.evaluated(tmp_path) == ({}, None)  # a converted model


def test_examples_are_of_the_dataset_of_the_run(tmp_path, picture, monkeypatch):
    (tmp_path / "copy").mkdir()
    copy = command.epath.Path(tmp_path / "copy")
    birds, drawn = command.starting_point(pretrained.folder_of("aviary-tiny"), copy)
    assert len(birds) == len(drawn) == 3
    assert all(page.read_image(path).size == (64, 64) for path in drawn)
    assert command.starting_point(tmp_path, copy) == ({}, [])  # a converted model
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    os.rename(picture, tmp_path / "mine" / "cat.png")
    for images, expected in ((tmp_path / "mine", ["00_cat.png"]), (tmp_path / "gone", [])):
        stored = {"evals": {"a": {"kind": "zeroshot", "images": str(images)}}}
        items = files.Items({}, stored, [], None)
        monkeypatch.setattr(files, "read_items", lambda folder, items=items: items)
        _, shown = command.starting_point(tmp_path / "run", copy)
        assert [os.path.basename(path) for path in shown] == expected


def test_what_the_user_names_wins_over_what_the_run_has(tmp_path, picture, predictor, monkeypatch):
    (tmp_path / "names.txt").write_text("owl\n")
    served, blocks = [], types.SimpleNamespace(block_thread=lambda: None)
    monkeypatch.setattr(inference, "load", lambda checkpoint: predictor)
    monkeypatch.setattr(command, "starting_point", lambda *_: (CLASSES, ["of_the_run.png"]))
    monkeypatch.setattr(page, "build", lambda views, *shown: served.append(shown) or blocks)
    monkeypatch.setattr(page, "launch", lambda *_: "http://here")
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    given = f"--classes={tmp_path}/names.txt", f"--examples={tmp_path}"
    for i, flags in enumerate(((), given)):
        command._serve(command.Demo.parse(["--checkpoint=x", *flags]), tmp_path / f"copies{i}")
    assert served[0] == (CLASSES, ["of_the_run.png"])
    assert served[1] == ({"owl": []}, [f"{tmp_path}/copies1/00_noise.png"])


def test_gradio_tells_nobody_of_the_page():
    assert not page.gr.analytics.analytics_enabled()


def test_examples_are_copied(tmp_path):
    for i in range(20):
        (tmp_path / "birds" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "birds" / f"c{i % 2}" / f"{i:02}.png").write_bytes(b"")
    (tmp_path / "copies").mkdir()
    copied = command.copies(str(tmp_path / "birds"), command.epath.Path(tmp_path / "copies"))
    assert len(copied) == 12 and copied[0].endswith("00_00.png") and copied[6].endswith("06_01.png")
    with pytest.raises(errors.UserError, match="--examples: .*gone: got no image"):
        command.copies(str(tmp_path / "gone"), tmp_path)


def test_a_taken_address_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.UserError, match=f"--port {port}: Address already in use"):
            command.check_address("127.0.0.1", port)
    with pytest.raises(errors.UserError, match="^--host 192.0.2.1: "):
        command.check_address("192.0.2.1", None)
    with pytest.raises(errors.UserError, match="--port: got '99999', expected a whole number in 1"):
        command.main(["--checkpoint", "none", "--port", "99999"])


@contextlib.contextmanager
def in_browser(predictor, folder):
    """A model's page in a browser, served by the command; it must end without a complaint."""
    pytest.importorskip("playwright")
    from tests import browser

    saved_model.save_model(folder / "model", predictor.model, predictor.params, source="test")
    flags = ["--checkpoint", str(folder / "model"), "--examples", str(folder)]
    arguments = [sys.executable, "-m", "grain_jax.demo", *flags]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().decode().split()[0]
            with browser.opened(url) as opened:
                yield opened.page
                assert opened.elsewhere == [] and opened.broken_pictures() == []
        finally:
            server.terminate()


@pytest.mark.slow  # a browser, which CI has not
def test_the_page_in_a_browser(tmp_path, predictor, picture):
    with in_browser(predictor, tmp_path) as opened:
        opened.get_by_label("Classes").fill("a <b>wren</b>: a short tail\nkite: a forked tail")
        opened.set_input_files("input[type=file]", picture)
        opened.get_by_text("a <b>wren</b>").locator("visible=true").first.wait_for()
        opened.get_by_text("region 1: ").first.wait_for()
        opened.get_by_label("Where is it?").fill("a forked tail; a beak")
        opened.keyboard.press("Enter")
        opened.get_by_text("a beak (").first.wait_for()
        opened.get_by_label("Classes").first.fill("wren\nwren")
        opened.get_by_role("button", name="Score").click()
        opened.get_by_text("got 'wren' twice").first.wait_for()
