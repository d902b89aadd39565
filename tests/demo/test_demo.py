import base64
import contextlib
import html
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import errors
from grain_jax.demo import __main__ as command
from grain_jax.demo import analysis, class_lists, views
from grain_jax.inference import text_decoder as in_use
from grain_jax.runtime import checkpoint, pretrained
from tests import perturbed, tiny
from tests.inference import test_text_decoder
from tests.paths import ROOT
from tests.report import workdirs

CLASSES = {
    "wren": ("a short tail", "a brown <b>back</b>"),
    "kite": ("a forked tail", "a short tail", "long wings"),
    "heron": ("a long beak",),
}
ALPHAS = (0.0, 0.15, 0.5, 1.0)
BOX = np.array([0.2, 0.3, 0.7, 0.8], np.float32)


def predictor_of(c):
    """A model of which every parameter counts."""
    return inference.Predictor(c.model, workdirs.parameters(c.model))


@pytest.fixture(scope="module")
def predictor():
    return predictor_of(tiny.config())


@pytest.fixture(scope="module")
def analyst(predictor):
    return analysis.Analyst(predictor)


@pytest.fixture(scope="module")
def two_towers():
    c = tiny.dictionary()
    c.model.decoder = None
    c.model.image.pool = "map"
    c.input.max_regions = 0
    return analysis.Analyst(predictor_of(config_lib.from_dict(c)))


@pytest.fixture(scope="module")
def with_head():
    c = tiny.config(model__boxes__kind="roi_align", loss__box_description=1.0)
    return analysis.Analyst(predictor_of(c))


def writer_of(c, **options):
    """A model with a text decoder of random parameters."""
    sizes = config_lib.TextDecoder(width=24, depth=1, heads=3, mlp_dim=40, bins=10, row_length=24)
    parameters = workdirs.parameters(c.model)
    decoder = test_text_decoder.random_decoder(c.model, sizes)
    predictor = inference.Predictor(c.model, parameters, text_decoder=decoder, **options)
    return analysis.Analyst(predictor)


@pytest.fixture(scope="module")
def writer():
    return writer_of(
        tiny.config(input__max_regions=0, model__decoder=None, model__image__pool="map")
    )


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    return PIL.Image.fromarray(noise)


def test_scores_are_those_of_classify(analyst, predictor, picture):
    for alpha in ALPHAS:
        result = analyst.analyse(picture, CLASSES, alpha)
        assert result.alpha == alpha and result.note == ""
        expected = predictor.classify([picture], CLASSES, alpha=alpha)[0]
        np.testing.assert_array_equal(result.combined, expected)
    np.testing.assert_array_equal(result.whole, predictor.classify([picture], CLASSES)[0])
    np.testing.assert_array_equal(
        result.regions, predictor.classify([picture], CLASSES, alpha=0.0)[0]
    )
    assert np.ptp(result.whole) > 1e-3 and np.ptp(result.regions) > 1e-3
    odds = np.exp(np.exp(float(predictor.params["logit_scale"])) * result.combined.astype(float))
    np.testing.assert_allclose(result.probabilities(), odds / odds.sum(), rtol=1e-5)


def test_names_alone_and_a_model_without_regions_have_the_global_score(
    analyst, predictor, two_towers, picture
):
    names = dict.fromkeys(CLASSES, ())
    result = analyst.analyse(picture, names, 0.5)
    assert result.alpha == 1 and result.regions is None and "no descriptions" in result.note
    np.testing.assert_array_equal(result.combined, predictor.classify([picture], list(CLASSES))[0])
    assert [s.text for s in analysis.seen(result)] == [""] * 5

    result = two_towers.analyse(picture, CLASSES, 0.5)
    assert result.alpha == 1 and result.regions is None and "no regions" in result.note
    expected = two_towers.predictor.classify([picture], CLASSES)[0]
    np.testing.assert_array_equal(result.combined, expected)
    (part,) = analysis.parts(result, 0)
    assert part.units == analysis.shown_units(expected[0])
    assert result.note in views.scores(result, softmax=False)
    assert "no regions" in views.regions(picture, result)
    with pytest.raises(errors.UserError, match="neither a box head nor regions"):
        two_towers.inside(picture, CLASSES, BOX)


def test_texts_and_pictures_are_encoded_once(predictor, picture, monkeypatch):
    texts, pictures = [], []
    encode_text, encode = predictor.encode_text, predictor._encode
    monkeypatch.setattr(predictor, "encode_text", lambda x: texts.append(x) or encode_text(x))
    monkeypatch.setattr(predictor, "_encode", lambda x: pictures.append(x) or encode(x))
    analyst = analysis.Analyst(predictor)
    first = analyst.analyse(picture, CLASSES, 0.5)
    assert texts and len(pictures) == 1
    texts.clear()
    again = analyst.analyse(picture.copy(), dict(CLASSES), 0.25)
    assert not texts and len(pictures) == 1
    np.testing.assert_array_equal(first.regions, again.regions)
    analyst.analyse(picture.rotate(180), CLASSES, 0.5)
    assert not texts and len(pictures) == 2
    analyst.analyse(picture, {**CLASSES, "heron": ("grey wings",)}, 0.5)
    assert texts and len(pictures) == 2


def test_the_parts_of_a_score_add_up(analyst, predictor, picture):
    _, regions = predictor.encode_image_and_regions([picture])
    for alpha in ALPHAS:
        result = analyst.analyse(picture, CLASSES, alpha)
        for c, texts in enumerate(CLASSES.values()):
            parts = analysis.parts(result, c)
            assert sum(p.units for p in parts) == analysis.shown_units(result.combined[c])
            assert all(abs(p.units - p.value * p.weight * 1e4) <= 1 for p in parts)
            assert [p.region for p in parts] == [None, 0, 1, 2, 3, 4]
            assert [p.weight for p in parts] == [alpha] + [(1 - alpha) / 5] * 5
            assert parts[0].value == result.whole[c]
            embeds = predictor.encode_text(list(texts))
            for part in parts[1:]:
                cosines = embeds @ regions.embed[0, part.region]
                np.testing.assert_allclose(part.value, cosines.max(), atol=1e-6)
                assert part.text == texts[cosines.argmax()]


def test_regions_and_descriptions_find_each_other(analyst, predictor, picture):
    result = analyst.analyse(picture, CLASSES, 0.5)
    for c, texts in enumerate(CLASSES.values()):
        found = analysis.found(result, c)
        assert [f.text for f in found] == list(texts)
        for f, lying in zip(found, analyst.find(picture, texts)):
            assert f.text == lying.text
            np.testing.assert_allclose(f.cosine, lying.region.score, atol=1e-6)
            np.testing.assert_array_equal(f.box_xyxy, lying.region.box_xyxy)

    distinct = list(dict.fromkeys(text for texts in CLASSES.values() for text in texts))
    cosines = (
        analyst.predictor.encode_text(distinct) @ predictor.encode_regions([picture]).embed[0].T
    )
    seen = analysis.seen(result)
    assert sorted(s.region for s in seen) == [0, 1, 2, 3, 4]
    assert [s.cosine for s in seen] == sorted((s.cosine for s in seen), reverse=True)
    for s in seen:
        assert s.text == distinct[cosines[:, s.region].argmax()]
        assert s.name == next(name for name, texts in CLASSES.items() if s.text in texts)


def check_ranked(boxed, predictor, embed):
    """The classes and descriptions of a box by its embedding [1, D]."""
    features = predictor.class_features(CLASSES).features
    expected = dict(zip(CLASSES, (embed @ features.T)[0]))
    assert [r.text for r in boxed.classes] == sorted(CLASSES, key=lambda name: -expected[name])
    assert len({round(r.cosine, 3) for r in boxed.classes}) == 3
    for ranked in boxed.classes:
        assert ranked.name == ranked.text
        np.testing.assert_allclose(ranked.cosine, expected[ranked.text], atol=3e-6)
    texts = list(dict.fromkeys(text for own in CLASSES.values() for text in own))
    cosines = dict(zip(texts, (predictor.encode_text(texts) @ embed[0]).tolist()))
    assert [r.text for r in boxed.descriptions] == sorted(texts, key=lambda text: -cosines[text])
    for ranked in boxed.descriptions:
        np.testing.assert_allclose(ranked.cosine, cosines[ranked.text], atol=3e-6)
        assert ranked.name == next(name for name, own in CLASSES.items() if ranked.text in own)


def test_a_box_is_what_the_box_head_says(with_head, picture, monkeypatch):
    predictor, calls = with_head.predictor, []
    encode = predictor.encode_tokens
    monkeypatch.setattr(predictor, "encode_tokens", lambda x: calls.append(x) or encode(x))
    boxed = with_head.inside(picture, CLASSES, BOX)
    assert boxed.region is None and boxed.iou == 1
    np.testing.assert_array_equal(boxed.box_xyxy, BOX)
    check_ranked(boxed, predictor, predictor.encode_boxes([picture], [[BOX]])[0])
    other = with_head.inside(picture.copy(), CLASSES, BOX / 2)
    assert abs(other.classes[0].cosine - boxed.classes[0].cosine) > 1e-4 and len(calls) == 1
    assert with_head.inside(picture, {"wren": (), "kite": ()}, BOX).descriptions == []


def test_without_a_box_head_the_region_that_overlaps_a_box_most_answers(
    analyst, predictor, picture
):
    _, (boxes, embeds) = predictor.encode_image_and_regions([picture])
    ends = np.minimum(boxes[0, :, 2:], BOX[2:]) - np.maximum(boxes[0, :, :2], BOX[:2])
    common = np.clip(ends, 0, None).prod(axis=1)
    area = lambda box: (box[..., 2:] - box[..., :2]).prod(axis=-1)
    iou = common / (area(boxes[0]) + area(BOX) - common)
    boxed = analyst.inside(picture, CLASSES, BOX)
    assert boxed.region == iou.argmax() and iou.max() > 0.01
    np.testing.assert_allclose(boxed.iou, iou.max(), atol=1e-6)
    check_ranked(boxed, predictor, embeds[:, boxed.region])


@pytest.mark.parametrize("kind", ["with_head", "analyst", "two_towers"])
def test_where_a_text_lies(kind, picture, monkeypatch, request):
    analyst = request.getfixturevalue(kind)
    predictor, texts = analyst.predictor, ["a short tail", "long wings"]
    maps = predictor.similarity_map(picture, texts)
    found = analyst.find(picture, texts)
    assert [lying.text for lying in found] == texts
    np.testing.assert_allclose([lying.cosines for lying in found], maps, atol=3e-6)
    assert min(np.ptp(lying.cosines) for lying in found) > 1e-3
    if kind == "two_towers":
        assert [lying.region for lying in found] == [None, None]
    else:
        for lying, answer in zip(found, predictor.ground(picture, texts), strict=True):
            np.testing.assert_array_equal(lying.region.box_xyxy, answer.box_xyxy)
            np.testing.assert_allclose(lying.region.score, answer.score, atol=1e-6)
    # Another text needs no image, the same ones need no model.
    monkeypatch.setattr(predictor, "_rows", None)
    assert np.ptp(analyst.find(picture.copy(), ["a long beak"])[0].cosines) > 1e-3
    monkeypatch.setattr(predictor, "encode_text", None)
    np.testing.assert_array_equal(analyst.find(picture, texts)[1].cosines, found[1].cosines)


@pytest.mark.parametrize("kind", ["with_head", "analyst", "two_towers"])
def test_the_class_of_each_pixel(kind, picture, monkeypatch, request):
    analyst, many = request.getfixturevalue(kind), {f"{i}, {i} more": () for i in range(20)}
    predictor, cosines = analyst.predictor, analyst.predictor.class_maps
    centred = lambda maps: maps - maps.mean((0, 2, 3), keepdims=True)  # else one class has it all
    monkeypatch.setattr(predictor, "class_maps", lambda *given: centred(cosines(*given)))
    # Embedded in one part and in two; a comma divides two names of a class.
    for classes in (CLASSES, many):
        labels = analyst.segment(picture, classes)
        given = classes if classes is CLASSES else list(classes)
        np.testing.assert_array_equal(labels, predictor.segment(picture, given))
        assert labels.shape == (30, 40) and len(np.unique(labels)) > 1
    large = picture.resize((1200, 150), PIL.Image.Resampling.NEAREST)  # the slimmest that is taken
    labels = analyst.segment(large, CLASSES)
    nearest = lambda n: ((np.arange(n) + 0.5) * 2.5).astype(int)
    expected = predictor.segment(large, CLASSES)[np.ix_(nearest(60), nearest(480))]
    assert labels.shape == (60, 480) and (labels == expected).mean() > 0.98
    monkeypatch.setattr(predictor, "encode_text", None)
    np.testing.assert_array_equal(analyst.segment(large, CLASSES), labels)


@pytest.mark.parametrize("head", ["roi_align", "none"])
def test_an_image_in_its_own_shape_has_maps_of_it(picture, head):
    changes = dict(boxes__kind=head, image__depth=1, text__depth=1, decoder__depth=1)
    model = perturbed.tiny(text__vocab_size=49408, **changes)
    predictor = inference.Predictor(model, perturbed.params(model), sequence_length=13)
    analyst, texts = analysis.Analyst(predictor), ["a short tail", "long wings"]
    wide = picture.crop((0, 0, 40, 12))
    maps = predictor.similarity_map(wide, texts)
    assert maps.shape == (2, 2, 6)
    found = [lying.cosines for lying in analyst.find(wide, texts)]
    np.testing.assert_allclose(found, maps, atol=3e-6)
    labels = analyst.segment(wide, CLASSES)
    np.testing.assert_array_equal(labels, predictor.segment(wide, CLASSES))
    assert labels.shape == (12, 40)


def test_what_is_not_segmented_is_one_line(analyst, picture, monkeypatch):
    slim = picture.resize((401, 50))
    with pytest.raises(
        class_lists.DemoError, match="got an image of 401 x 50 pixels, expected"
    ) as e:
        analyst.segment(slim, CLASSES)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(analyst, "grid", 0)
    with pytest.raises(
        class_lists.DemoError, match="the model has no maps, expected an image tower"
    ):
        analyst.segment(picture, CLASSES)
    monkeypatch.undo()
    monkeypatch.setattr(analysis, "SECONDS", -1.0)
    with pytest.raises(class_lists.DemoError, match="0 of 1 classes took -1 s; give fewer"):
        analyst.segment(picture, {"a new one": ()})


def test_what_the_text_decoder_says_and_where_it_points(writer, picture, monkeypatch):
    predictor, texts, calls = writer.predictor, ["a short tail", "wings"], []
    (caption,) = predictor.caption([picture])
    ((said,),) = predictor.describe([picture], [[BOX]])
    pointed = predictor.point(picture, texts)
    encode = predictor.encode_tokens
    monkeypatch.setattr(predictor, "encode_tokens", lambda x: calls.append(x) or encode(x))
    assert writer.caption(picture) == writer.caption(picture.copy()) == caption
    boxed = writer.inside(picture, CLASSES, BOX)
    assert boxed.said == said and boxed.classes == [] and said.text != caption.text
    found = writer.find(picture, texts)
    for lying, text, expected in zip(found, texts, pointed, strict=True):
        assert lying.text == text and lying.region is None and lying.cosines is not None
        np.testing.assert_array_equal(lying.pointed.box_xyxy, expected.box_xyxy)
        np.testing.assert_allclose(
            lying.pointed.log_probability, expected.log_probability, atol=1e-5
        )
    assert len(calls) == 1  # the image tower runs once

    shown = views.inside(boxed)
    number = f"{said.log_probability:.4f}".replace("-", "\N{MINUS SIGN}")
    dots = "" if said.is_whole else " …"
    assert (
        f"“{html.escape(said.text)}{dots}” <span" in shown and f"log-probability {number}" in shown
    )
    assert "no class is ranked" in shown and "<table>" not in shown
    assert html.escape(caption.text) in views.caption(caption)
    assert "&lt;b&gt;" in views.caption(caption._replace(text="<b>"))


def test_an_image_is_seen_in_its_own_shape(picture, monkeypatch):
    c = tiny.config(model__boxes__kind="roi_align", loss__box_description=1.0, **tiny.SHALLOW)
    analyst, texts = writer_of(c, sequence_length=12), ["a short tail", "wings"]
    predictor, maps = analyst.predictor, analyst.predictor.class_maps
    wide = picture.resize((120, 40), PIL.Image.Resampling.NEAREST)
    result = analyst.analyse(wide, CLASSES, 0.5)
    expected = predictor.classify([wide], CLASSES, alpha=0.5)[0]
    np.testing.assert_array_equal(result.combined, expected)
    found = analyst.find(wide, texts)
    cosines, pointed = predictor.similarity_map(wide, texts), predictor.point(wide, texts)
    assert cosines.shape[1:] == tuple(predictor.preprocess(wide).grid) == (2, 6)
    for lying, own, expected in zip(found, cosines, pointed, strict=True):
        np.testing.assert_allclose(lying.cosines, own, atol=3e-6)
        np.testing.assert_array_equal(lying.pointed.box_xyxy, expected.box_xyxy)
    (shown,) = re.findall(
        r'similarity map of wings[^>]* src="data:[^,]*,([^"]*)"', views.places(wide, found)
    )
    assert PIL.Image.open(io.BytesIO(base64.b64decode(shown))).size == (480, 160)
    check_ranked(
        analyst.inside(wide, CLASSES, BOX), predictor, predictor.encode_boxes([wide], [[BOX]])[0]
    )
    assert analyst.caption(wide) == predictor.caption([wide])[0]
    centred = lambda maps: [x - x.mean((1, 2), keepdims=True) for x in maps]
    monkeypatch.setattr(predictor, "class_maps", lambda *given: centred(maps(*given)))
    for image in (wide, wide.resize((300, 10))):  # windows would be too many
        labels = analyst.segment(image, CLASSES)
        np.testing.assert_array_equal(labels, predictor.segment(image, CLASSES))
        assert labels.shape == image.size[::-1] and len(np.unique(labels)) > 1
    assert analyst.segment(wide.resize((960, 320)), CLASSES).shape == (160, 480)


def test_a_box_that_is_pointed_at_lies_beside_the_region_of_a_text(picture):
    region = inference.Grounding(BOX, 0.5)
    pointed = in_use.Pointed(BOX / 2, -1.25)
    shown = views.places(picture, [analysis.Lying("a <i>tail", region, None, pointed)])
    ours, theirs = shown.split("<section>")[1:]
    assert "<h4>Regions, by their cosine</h4>" in ours and "left:20.00cqw" in ours
    assert "<h4>Text decoder, log-probability of its box</h4>" in theirs
    assert "left:10.00cqw" in theirs and "\N{MINUS SIGN}1.2500" in theirs
    assert shown.count("a &lt;i&gt;tail") == 2
    names = re.findall(r'radio" name="(\w+)"', shown)
    assert names == ["phrases", "phrases_pointed"]
    ranked = [analysis.Ranked("wren", "wren", 0.25)]
    said = in_use.Written("a <tail>", -0.5)
    shown = views.inside(analysis.Boxed(BOX, None, 1.0, ranked, [], said))
    assert (
        shown.index("a &lt;tail&gt;")
        < shown.index("embedded by the box head")
        < shown.index("wren")
    )


def test_a_box_as_it_is_typed():
    for text, expected in (
        ("10 20 50 60", [0.1, 0.2, 0.5, 0.6]),
        (" 0%, 0%; 100%,100% ", [0, 0, 1, 1]),
        ("1e1,2.5 ,50.25,6e1", [0.1, 0.025, 0.5025, 0.6]),
    ):
        box = analysis.read_box(text)
        assert box.dtype == np.float32
        np.testing.assert_allclose(box, expected, atol=1e-7)


def test_classes_as_they_are_typed():
    typed = "# birds\nwren: a short tail ; ; a brown back;\n\n kite:a forked tail"
    described = {"wren": ("a short tail", "a brown back"), "kite": ("a forked tail",)}
    assert class_lists.parse(typed) == described
    assert class_lists.parse("wren\nkite:\n") == {"wren": (), "kite": ()}
    assert class_lists.parse('["a: b", "c"]') == {"a: b": (), "c": ()}
    assert class_lists.parse(json.dumps(described)) == described
    assert class_lists.format(described).splitlines()[1] == "kite: a forked tail"
    for odd in ({"a: b": ("c",)}, {"a": ("b; c",)}, {"#1": (), "[x": ()}, {"a\nb": ("c",)}):
        assert class_lists.parse(class_lists.format(odd)) == odd


FAULTY = [
    ("", "no class name"),
    ("[]", "no class name"),
    ("wren: a tail\n : red", "line 2: got ': red', expected a name"),
    ("wren: a tail\nkite", "'kite': no description, but others have some"),
    ("wren\nkite\nwren", "'wren': given twice"),
    ("M\u00f6we\nkite\nMo\u0308we", "'M\u00f6we': given twice"),
    ('{"wren": ["a"], "wren": ["b"]}', "'wren': given twice"),
    ('{"wren": ["a"]', "not JSON: "),
    ('{"wren": "a tail"}', 'at "wren": expected {"class name": ["description", ...]}'),
    ('{"wren": [1]}', 'at "wren": expected'),
    ("[3]", "at 3: expected"),
    ("\n".join(map(str, range(1001))), "got 1001 classes, expected at most 1000"),
]


@pytest.mark.parametrize("text, expected", FAULTY)
def test_faulty_classes_are_one_line(text, expected):
    with pytest.raises(class_lists.DemoError) as error:
        class_lists.parse(text)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_faulty_files_are_one_line(tmp_path, picture):
    (tmp_path / "D.json").write_text('{"wren"')
    (tmp_path / "x.png").write_bytes(b"\xff\xfe no picture")
    for read, name, expected in [
        (class_lists.read, "D.json", "D.json: not JSON"),
        (class_lists.read, "x.png", "not of UTF-8 text"),
        (class_lists.read, "gone.txt", "no such file"),
        (analysis.read_image, "x.png", "x.png: 13 bytes that are no known image format"),
        (analysis.read_image, "gone.png", "No such file"),
    ]:
        with pytest.raises(class_lists.DemoError, match=expected):
            read(tmp_path / name)
    with pytest.raises(class_lists.DemoError, match="no image; drop one"):
        analysis.read_image(None)
    picture.convert("P").save(tmp_path / "palette.png")
    assert analysis.read_image(tmp_path / "palette.png").mode == "RGB"


def cells(table):
    """The texts of a table's rows; a minus sign as Python reads it."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table)
    text = lambda cell: html.unescape(re.sub("<[^>]*>", " ", cell)).replace("\N{MINUS SIGN}", "-")
    return [[text(cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", r)] for r in rows]


def test_what_the_page_shows(analyst, predictor, picture):
    result = analyst.analyse(picture, CLASSES, 0.15)
    expected = dict(zip(CLASSES, predictor.classify([picture], CLASSES, alpha=0.15)[0]))
    first, second, _ = ranked = sorted(expected, key=lambda name: -expected[name])

    shown = views.scores(result, softmax=True)
    rows = cells(shown)[1:]
    assert [row[0] for row in rows] == ranked
    assert [row[1] for row in rows] == [f"{expected[name]:.4f}" for name in ranked]
    np.testing.assert_allclose(sum(float(row[4].rstrip("%")) for row in rows), 100, atol=0.2)
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", shown)]
    assert len(widths) == 9 and max(widths) <= 100
    assert "softmax" not in views.scores(result, softmax=False)

    why = views.why(result)
    cards = why.split("<section>")[1:]
    assert "a brown &lt;b&gt;back&lt;/b&gt;" in views.why(result, "wren")
    totals = []
    for card, name in zip(cards, (first, second)):
        assert f"<h3>{name}</h3>" in card
        rows = cells(card.split("<h4>")[0])
        adds = [round(float(row[3]) * 1e4) for row in rows[1:]]
        assert len(adds) == 7 and sum(adds[:-1]) == adds[-1]
        assert rows[-1] == ["score", "", "", f"{expected[name]:.4f}"]
        assert [row[0] for row in cells(card.split("<h4>")[1])[1:]] == list(CLASSES[name])
        totals.append(adds[-1])
    gap, whole, regions = (
        round(float(x) * 1e4)
        for x in re.findall(
            r"[+-]\d\.\d{4}", cells(f"<tr><td>{why.split('</p>')[0]}</td></tr>")[0][0]
        )
    )
    assert gap == totals[0] - totals[1] == whole + regions
    alone = analyst.analyse(picture, {"wren": ("a tail",)}, 0.5)
    assert "no other class" in views.why(alone, "gone")
    third = views.why(result, ranked[2]).split("<h3>")[1:]
    assert [card.split("<")[0] for card in third] == [ranked[2], first]


def test_boxes_lie_where_the_model_sees_them(analyst, predictor, picture):
    result = analyst.analyse(picture, CLASSES, 0.5)
    seen = analysis.seen(result)
    figure = views.regions(picture, result, most=3)
    places = re.findall(
        r"left:([\d.]+)cqw;top:([\d.]+)cqw;width:([\d.]+)cqw;height:([\d.]+)cqw", figure
    )
    boxes = np.stack([s.box_xyxy for s in seen[:3]]) * 100
    tall = 30 / 40  # the image's height in its widths
    expected = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    expected[:, 1::2] *= tall
    np.testing.assert_allclose(np.array(places, float), expected, atol=0.011)
    slim = views.regions(picture.resize((100, 600)), result, most=1)  # 80 of 320 pixels wide
    assert f"left:{37.5 + boxes[0, 0] / 4:.2f}cqw;top:{boxes[0, 1] * 6 / 4:.2f}cqw" in slim
    assert "3 of 5 regions" in figure and 'src="data:image/jpeg;base64,' in figure
    between = (seen[1].cosine + seen[2].cosine) / 2
    assert "2 of 5 regions" in views.regions(picture, result, threshold=between)

    found = analyst.find(picture, ["a <i>tail", "wings"])
    figure = views.places(picture, found)
    assert "a &lt;i&gt;tail" in figure and "<i>tail" not in figure
    for lying in found:
        assert f"left:{lying.region.box_xyxy[0] * 100:.2f}cqw" in figure
    assert figure.count('<div class="map"') == 2
    alone = views.places(picture, [lying._replace(region=None) for lying in found])
    assert "cqw;" not in alone and alone.count("<section>") == 2


def test_a_similarity_map_is_one_colour_over_grey(picture):
    cosines = np.array([[0.1, 0.2, 0.3], [-0.25, 0.2, 0.2]], np.float32)
    pixels = np.asarray(views.blend(views.grey(picture), cosines), int)
    assert pixels.shape == (360, 480, 3)
    colour = np.ptp(pixels, axis=-1)  # 0 where the image is grey
    high, low = colour[:60, -60:], colour[-60:, :60]
    assert high.min() > 190 and low.max() == 0
    between = colour[-60:, 236:244]
    np.testing.assert_allclose(between.mean() / high.mean(), 0.45 / 0.55, atol=0.02)
    same = np.asarray(views.blend(views.grey(picture), np.full((2, 2), 0.5, np.float32)))
    assert np.ptp(same, axis=-1).max() == 0 and np.ptp(same) > 50  # the image is seen
    assert views.grey(PIL.Image.new("RGB", (900, 2))).shape == (1, 480)

    (shown,) = views.places(picture, [analysis.Lying('a "tail', None, cosines)]).split("<img")[1:]
    alt = 'alt="similarity map of a &quot;tail: highest at 83% from the left and 25% from the top"'
    assert alt in shown and "\N{MINUS SIGN}0.2500" in shown and "0.3000" in shown


def test_a_segmentation_is_coloured_by_its_classes(picture):
    names = [f"<{i}>" for i in range(24)]
    labels = np.repeat(np.arange(24), 10).reshape(12, 20)
    labels[:6] = 3
    shown = views.segmented(picture, labels, names)
    tables = [cells(table)[1:] for table in shown.split("<table>")[1:]]
    (rows,) = tables
    assert rows[0] == ["<3>", "50.0%"] and [row[0] for row in rows[1:]] == names[12:]
    np.testing.assert_allclose(sum(float(row[1][:-1]) for row in rows), 100, atol=0.7)
    assert "Classes with pixels: 13 of 24." in shown
    alt = html.escape(
        "the class of each pixel: 50.0% <3>, 4.2% <12>, 4.2% <13>, 4.2% <14>, 4.2% <15>, ..."
    )
    assert f'alt="{alt}"' in shown

    (uri,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', shown)
    pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(uri))), float)
    assert pixels.shape == (360, 480, 3)
    swatches = [bytes.fromhex(x) for x in re.findall("--c:#([0-9a-f]{6})", shown)]
    assert len(set(swatches)) == 13
    expected = 0.45 * views.grey(picture)[:, :, None] + 0.55 * np.array(list(swatches[0]))
    np.testing.assert_allclose(pixels[:170].mean((0, 1)), expected[:170].mean((0, 1)), atol=2)
    last = 0.45 * views.grey(picture)[340:, 250:, None] + 0.55 * np.array(list(swatches[-1]))
    np.testing.assert_allclose(pixels[340:, 250:].mean((0, 1)), last.mean((0, 1)), atol=2)

    every = views.segmented(picture, np.arange(24)[:, None], names)
    assert "<summary>4 more classes</summary>" in every and every.count("4.2%<") == 24


def test_what_the_page_says_of_a_box(picture):
    ranked = [analysis.Ranked(f"<{i}>", f"<{i}>", 0.3 - i / 10) for i in range(12)]
    described = [analysis.Ranked("a tail", "<1>", 0.4), analysis.Ranked("<b>", "<2>", -0.9)]
    shown = views.inside(analysis.Boxed(BOX, None, 1.0, ranked, described))
    assert "20 30 70 80 (x1 y1 x2 y2, %), embedded by the box head" in shown
    classes, rest, descriptions = (cells(table)[1:] for table in shown.split("<table>")[1:])
    assert [row[0] for row in classes + rest] == [f"<{i}>" for i in range(12)]
    assert classes[4] == ["<4>", "-0.1000"] and len(classes) == 10
    assert descriptions == [["a tail  (<1>)", "0.4000"], ["<b>  (<2>)", "-0.9000"]]
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", shown)]
    np.testing.assert_allclose(widths[0] / widths[-1], 0.3 / 0.9, atol=1e-3)  # one scale for all
    assert len(widths) == 14 and max(widths) <= 100

    shown = views.inside(analysis.Boxed(BOX, 2, 0.4321, ranked[:1], []))
    said = cells(f"<tr><td>{shown.split('<table>')[0]}</td></tr>")[0][0]
    assert "no box head" in said and "with an IoU of 0.43" in said and shown.count("<table>") == 1
    assert re.search(r"Region +3 +answers", said)
    assert "no region overlaps" in views.inside(analysis.Boxed(BOX, 2, 0.0, ranked[:1], []))
    canvas = views.canvas(picture)
    assert '<span class="drawn" hidden>' in canvas and 'draggable="false"' in canvas


def test_the_page_opens_with_the_classes_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "D.json").write_text('{"wren": ["a tail"]}')
    (tmp_path / "secret.txt").write_text("root\nalice")
    (tmp_path / "100" / "config").mkdir(parents=True)
    wren = {"wren": ("a tail",)}
    for first, second, expected in (
        ({"kind": "retrieval"}, {"descriptions": "D.json"}, wren),
        ({"descriptions": "gone.json"}, {"descriptions": "D.json"}, wren),
        # Of a stranger's config: lines are not shown.
        ({"descriptions": "secret.txt"}, {"descriptions": "gs://elsewhere/D.json"}, None),
    ):
        stored = json.dumps({"evals": {"a": first, "b": second}})
        (tmp_path / "100" / "config" / "metadata").write_text(stored)
        assert class_lists.of_run(tmp_path / "100") == expected
    assert class_lists.of_run(tmp_path) is None  # a converted model


def test_examples_are_of_the_dataset_of_the_run(tmp_path, picture):
    (tmp_path / "drawn").mkdir()
    drawn = command._examples(pretrained.folder_of("aviary-tiny"), tmp_path / "drawn")
    assert [analysis.read_image(path).size for path in drawn] == [(240, 240)] * 3
    assert command._examples(tmp_path, tmp_path / "none") == []  # a converted model
    (tmp_path / "mine").mkdir()
    picture.save(tmp_path / "mine" / "cat.png")
    (tmp_path / "run" / "config").mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    for images, expected in ((tmp_path / "mine", ["00_cat.png"]), (tmp_path / "gone", [])):
        stored = json.dumps({"evals": {"a": {"kind": "zeroshot", "images": str(images)}}})
        (tmp_path / "run" / "config" / "metadata").write_text(stored)
        shown = command._examples(tmp_path / "run", command.epath.Path(tmp_path / "copy"))
        assert [os.path.basename(path) for path in shown] == expected


def test_examples_are_copied(tmp_path, picture):
    for i in range(20):
        (tmp_path / "birds" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "birds" / f"c{i % 2}" / f"{i:02}.png")
    (tmp_path / "copies").mkdir()
    copied = command._copies(str(tmp_path / "birds"), command.epath.Path(tmp_path / "copies"))
    assert len(copied) == 12 and copied[0].endswith("00_00.png") and copied[6].endswith("06_01.png")
    with pytest.raises(errors.UserError, match="no such folder"):
        command._copies(str(tmp_path / "gone"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UserError, match="holds no image"):
        command._copies(str(tmp_path / "empty"), tmp_path)


def test_without_gradio_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", "none"])
    with pytest.raises(SystemExit) as end:
        command.process.run(command.main)
    assert end.value.code == 2
    line = capsys.readouterr().err.strip()
    assert 'pip install "grain_jax[demo]"' in line and "\n" not in line


def test_a_taken_address_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.UserError, match=f"--port {port}: Address already in use"):
            command._check_address("127.0.0.1", port)
    with pytest.raises(errors.UserError, match="^--host 192.0.2.1: "):
        command._check_address("192.0.2.1", None)
    with pytest.raises(errors.UserError, match="--port: got '99999', expected a whole number in 1"):
        command.main(["--checkpoint", "none", "--port", "99999"])


@contextlib.contextmanager
def in_browser(analyst, folder):
    """A model's page in a browser, served by the command; it must end without a complaint."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    from tests import browser

    model = analyst.predictor
    given = model.model, model.params, model.text_decoder
    checkpoint.save_model(folder / "model", *given, source="test")
    (folder / "temporary").mkdir()
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "grain_jax.demo", "--checkpoint", str(folder / "model")],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder / "temporary")},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as server,
    ):
        try:
            with browser.opened(server.stdout.readline().split()[0]) as found:
                yield found.page
                # Gradio's own client says so of every page.
                complaints = [c for c in found.complaints() if c != "Method not implemented."]
                assert complaints == [] and found.broken_pictures() == []
        finally:
            server.terminate()
            server.wait()
    assert "Traceback" not in (folder / "log.txt").read_text()
    assert server.returncode == 0
    assert list((folder / "temporary").iterdir()) == []  # uploads are gone


@pytest.mark.slow  # a browser, which CI has not
def test_the_page_in_a_browser(tmp_path, analyst, picture):
    picture.save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "faulty.json").write_text('{"wren"')
    (tmp_path / "D.json").write_text(json.dumps(CLASSES))
    with in_browser(analyst, tmp_path) as page:
        use_the_page(page, tmp_path)


@pytest.mark.slow  # a browser, which CI has not
def test_the_page_of_a_model_without_regions(tmp_path, two_towers):
    with in_browser(two_towers, tmp_path) as page:
        page.locator("#examples button").first.click()
        page.locator("#scores", has_text="The model has no regions").wait_for()
        assert page.locator("#why tr.sum").count() == 2
        assert [page.locator(x).count() for x in ("#regions", "#canvas", "#alpha")] == [0, 0, 0]
        find(page, "a roof")
        page.locator("#found .map img[alt^='similarity map of a roof: highest']").wait_for()
        assert page.locator("#found .box").count() == 0


@pytest.mark.slow  # a browser, which CI has not
def test_a_box_that_is_drawn_on_the_page(tmp_path, with_head):
    with in_browser(with_head, tmp_path) as page:
        page.locator("#examples button").first.click()
        draw_a_box(page, "embedded by the box head")
        rows = page.locator("#boxed td:first-child").all_inner_texts()
        assert sorted(rows[:3]) == sorted(x.name for x in command._species()) and len(rows) == 13
        drawn = page.locator("#canvas .drawn")
        before = page.locator("#boxed").inner_text()

        page.fill("#box input, #box textarea", "5 10 45 50")
        assert drawn.evaluate("e => [e.style.left, e.style.height]") == ["5%", "40%"]
        page.keyboard.press("Enter")
        page.locator("#boxed", has_text="Box 5 10 45 50").wait_for()
        assert page.locator("#boxed").inner_text() != before
        for wrong in ("5 10 4 50", "5 10 45", "a box", "5 10 45 101"):
            page.fill("#box input, #box textarea", wrong)
            assert not drawn.is_visible()
            page.keyboard.press("Enter")
            page.locator("#boxed .line", has_text=f'box: got "{wrong}", expected x1 y1').wait_for()
        page.fill("#classes textarea", "roof\nsail")
        page.fill("#box input, #box textarea", "5 10 45 50")
        page.click("#go")
        page.locator("#boxed td", has_text="sail").wait_for()
        assert page.locator("#boxed tbody tr").count() == 2
        page.mouse.click(*middle(page.locator("#canvas img")))  # draws nothing
        assert drawn.evaluate("e => [e.hidden, e.style.left]") == [False, "5%"]

        page.click("#segment")
        page.locator("#segmented td", has_text="sail").wait_for()
        page.locator("#examples button").nth(1).click()
        page.wait_for_function("!document.querySelector('#boxed').innerText.trim()")
        page.wait_for_function("!document.querySelector('#segmented').innerText.trim()")
        assert not drawn.is_visible() and page.input_value("#box input, #box textarea") == ""
        find(page, "a white sail; blue water; a brown hull")
        page.locator("#found .map").nth(2).wait_for()
        assert page.locator("#found .box").count() == 3


@pytest.mark.slow  # a browser, which CI has not
def test_what_is_written_on_the_page(tmp_path, with_head):
    writer = writer_of(tiny.config(model__boxes__kind="roi_align", loss__box_description=1.0))
    with in_browser(writer, tmp_path) as page:
        page.locator("#examples button").first.click()
        page.locator("#caption .said", has_text="log-probability").wait_for()
        draw_a_box(page, "embedded by the box head")
        assert page.locator("#boxed .said").count() == 1
        find(page, "a white sail; blue water")
        page.locator("#found h4", has_text="Text decoder").wait_for()
        assert page.locator("#found .box").count() == 4


def find(page, phrases):
    """Types phrases."""
    page.fill("#phrase input, #phrase textarea", phrases)
    page.keyboard.press("Enter")


def middle(picture):
    """The middle of an element on the screen, x and y."""
    box = picture.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def draw_a_box(page, said):
    """Drags a box from 20% 30% to 70% 80% of the image, from its right bottom corner."""
    picture = page.locator("#canvas img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.move(*at(0.7, 0.8))
    page.mouse.down()
    page.mouse.move(*at(0.3, 0.4))
    page.mouse.move(*at(0.2, 0.3))
    assert page.locator("#canvas .drawn").is_visible()
    page.mouse.up()
    page.locator("#boxed", has_text=said).wait_for()
    typed = [float(word) for word in page.input_value("#box input, #box textarea").split()]
    np.testing.assert_allclose(typed, [20, 30, 70, 80], atol=0.5)


def use_the_page(page, folder):
    """What a user does, right and wrong."""
    said = page.locator("#message")
    page.click("#go")
    said.get_by_text("no image; drop one, or choose an example").wait_for()
    page.set_input_files("#image input[type=file]", folder / "broken.png")
    said.get_by_text("broken.png: 10 bytes that are no known image format").wait_for()
    page.click("#image button[aria-label='Remove Image']")
    page.set_input_files("#image input[type=file]", folder / "noise.png")
    page.locator("#scores td", has_text=command._species()[0].name).wait_for()
    assert said.inner_text().strip() == ""
    assert page.locator("#scores tbody tr").count() == 3

    with page.expect_file_chooser() as chooser:
        page.click("#file")
    chooser.value.set_files(folder / "faulty.json")
    said.get_by_text("faulty.json: not JSON").wait_for()
    with page.expect_file_chooser() as chooser:
        page.click("#file")
    chooser.value.set_files(folder / "D.json")
    page.locator("#scores td", has_text="heron").wait_for()
    last = page.locator("#scores tbody tr td:first-child").all_inner_texts()[-1]
    page.click("#chosen input")
    page.get_by_role("option", name=last).click()
    page.locator("#why section:first-child h3", has_text=last).wait_for()
    page.fill("#classes textarea", "${1}: {{a}} <u>tail\nkite: a forked tail; long wings")
    page.press("#classes textarea", "Shift+Enter")
    page.locator("#scores td", has_text="kite").wait_for()
    page.locator("#why", has_text="{{a}} <u>tail").wait_for()
    assert page.locator("#scores td:first-child").all_inner_texts().count("${1}") == 1
    for card in page.locator("#why section").all():
        table = card.locator("table").first
        adds = [
            text.replace("\N{MINUS SIGN}", "-")
            for text in table.locator("td:last-child").all_inner_texts()
        ]
        units = [round(float(text) * 1e4) for text in adds]
        assert len(units) == 7 and sum(units[:-1]) == units[-1]

    visible = "e => +getComputedStyle(e).opacity"
    boxes = page.locator("#regions .box")
    assert boxes.count() == 5
    page.locator("#regions input[value='all']").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)  # the boxes fade
    assert [box.evaluate(visible) for box in boxes.all()] == [1, 0, 0, 0, 0]
    page.locator("#regions label.region").nth(2).hover()
    page.wait_for_timeout(300)
    assert [box.evaluate(visible) for box in boxes.all()] == [0, 0, 1, 0, 0]

    find(page, "long wings; a tail")
    page.locator("#found .box").nth(1).wait_for()
    assert page.locator("#found .text").all_inner_texts() == ["long wings", "a tail"]
    assert page.locator("#found .map img").count() == 2
    page.click("#segment")
    page.locator("#segmented img[alt^='the class of each pixel: ']").wait_for()
    assert "Classes with pixels: " in page.locator("#segmented").inner_text()
    draw_a_box(page, "The model has no box head")
    assert page.locator("#boxed td:first-child").first.inner_text() in ("${1}", "kite")
    page.fill("#alpha input[type=number]", "3")
    page.locator("#scores th", has_text="alpha 1)").wait_for()
    rows = page.locator("#scores tbody tr").all()
    for row in rows:  # the whole image alone
        assert row.locator("td").nth(1).inner_text() == row.locator("td").nth(2).inner_text()
