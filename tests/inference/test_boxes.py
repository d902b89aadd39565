"""Given boxes and similarity maps: `encode_boxes`, `classify_boxes`, `similarity_map`."""

import functools

import jax
import numpy as np
import PIL.Image
import pytest
from scipy import special

from grain_jax import inference
from grain_jax.core import schema
from grain_jax.inference import scores, segmentation
from grain_jax.models import grain
from tests import perturbed
from tests import turned as camera

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
ENDS = np.random.default_rng(1).random((2, 3, 4, 2), np.float32)
BOXES = np.concatenate([ENDS.min(0), ENDS.max(0)], axis=-1)  # [3, 4, 4]
TEXTS = np.array([[298, 5, 6, 299], [298, 7, 299, 0]], np.int32)


@functools.cache
def _predictor(**changes):
    decoder = {} if "decoder" in changes else dict(decoder__depth=1)
    model = perturbed.tiny(image__depth=1, text__depth=1, **decoder, **changes)
    return inference.Predictor(model, perturbed.params(model))


@pytest.fixture
def predictor():
    return _predictor(boxes__kind="roi_align")


def applied(predictor, method, *arguments):
    """What the module itself returns."""
    apply = jax.jit(grain.GRAIN(predictor.model).apply, static_argnames="method")
    return apply({"params": predictor.params}, *arguments, method=method)


def of_boxes(predictor, images, boxes):
    """The box embeddings of the module itself."""
    return applied(predictor, "box_embeddings", applied(predictor, "image_tokens", images), boxes)


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_any_number_of_boxes_an_image(predictor):
    expected = of_boxes(predictor, PICTURES, BOXES)
    got = predictor.encode_boxes(PICTURES, [BOXES[0], [], BOXES[2, :3]])
    assert [x.shape for x in got] == [(4, 28), (0, 28), (3, 28)]
    close([got[0], got[2]], [expected[0], expected[2, :3]])
    assert np.abs(got[0][0] - got[0][1]).max() > 1e-3
    # Their tokens stand for images.
    tokens = predictor.encode_tokens(PICTURES)
    assert tokens.values.shape[0] == 3
    close(predictor.encode_boxes(tokens, BOXES), expected)
    close(predictor.encode_image(tokens), predictor.encode_image(PICTURES))


@pytest.mark.parametrize("kind", ["none", "roi_align"])
def test_a_phrase_is_compared_with_the_regions_or_their_boxes(kind):
    predictor = _predictor(boxes__kind=kind)
    texts = predictor.encode_text(TEXTS)
    boxes_xyxy, regions, prior = predictor.encode_regions(PICTURES[:1])
    assert not prior.any()
    embeds = regions if kind == "none" else of_boxes(predictor, PICTURES[:1], boxes_xyxy)
    similarity = texts @ np.asarray(embeds[0]).T
    for each, row in zip(predictor.ground(PICTURES[0], TEXTS), similarity, strict=True):
        np.testing.assert_allclose(each.score, row.max(), atol=3e-6)
        np.testing.assert_allclose(each.box_xyxy, boxes_xyxy[0, row.argmax()], atol=3e-6)
    assert kind == "none" or np.abs(similarity - texts @ regions[0].T).max() > 1e-2


@pytest.mark.parametrize("sort", perturbed.PROPOSALS)
def test_proposals_are_the_boxes_of_all_patches(sort):
    predictor = _predictor(**perturbed.PROPOSALS[sort])
    tokens = applied(predictor, "image_tokens", PICTURES)
    image_embed, _, _, patches = applied(predictor, "embeddings", tokens)
    centre, half = patches.boxes_cxcywh[..., :2], patches.boxes_cxcywh[..., 2:] / 2
    corners = np.clip(np.concatenate([centre - half, centre + half], axis=-1), 0, 1)
    prior = -0.3 * np.logaddexp(0, -np.asarray(patches.logit, np.float64))
    regions = predictor.encode_regions(PICTURES)
    close(regions, (corners, applied(predictor, "box_embeddings", tokens, corners), prior))
    assert regions.embed.shape == (3, 25, 28) and np.ptp(regions.prior) > 1e-3
    close(predictor.encode_image(PICTURES), image_embed)
    texts = predictor.encode_text(TEXTS)
    cosines = np.einsum("bqd,nd->bqn", regions.embed, texts)
    score = cosines + prior[..., None]
    for each, row in zip(predictor.ground(PICTURES[0], TEXTS), score[0].T, strict=True):
        np.testing.assert_allclose(each.score, row.max(), atol=3e-6)
        np.testing.assert_array_equal(each.box_xyxy, regions.boxes_xyxy[0, row.argmax()])
    # Several texts share the prior: it is a factor of their softmax.
    scale = predictor.region_logit_scale
    shares = special.softmax(scale * cosines.astype(np.float64), axis=-1)
    expected = shares * np.exp(scale * prior)[..., None]
    close(predictor.text_scores(regions.embed, texts, regions.prior), expected)
    close(predictor.text_scores(regions.embed, texts[:1], regions.prior), score[..., :1])
    described = inference.ClassFeatures(("a", "b"), texts, (texts[:1], texts[1:]))
    close(predictor.classify(PICTURES, described, alpha=0), score.max(axis=1))
    maps = predictor.similarity_map(PICTURES[0], TEXTS)
    of_regions = scores.region_map(score[0].T, regions.boxes_xyxy[0], 5)
    patch = np.einsum("nd,hwd->nhw", texts, predictor.encode_patches(PICTURES[0]))
    close([maps], [(patch + of_regions) / 2])
    asked = segmentation.Classes(("a", "b"), texts, np.arange(2))
    got = predictor.class_maps(PICTURES[:1], asked, by="regions", patch_features="tokens")
    close(got, [of_regions])


def test_boxes_are_shares_or_pixels_of_the_image_as_it_was_given(monkeypatch):
    predictor, wide = _predictor(), PIL.Image.fromarray(PICTURES[0]).resize((90, 30))
    embeds, turned = predictor.encode_text(TEXTS), wide.copy()
    monkeypatch.setattr(predictor, "encode_text", lambda texts: embeds)
    turned.info["exif"] = camera.exif(6)
    for image, size in ((wide, (90, 30)), (np.asarray(wide), (90, 30)), (turned, (30, 90))):
        for answers in (predictor.ground, lambda *x, **how: [predictor.detect(*x, **how)]):
            shares, pixels = (answers(image, ["a", "b"], **x) for x in ({}, {"pixels": True}))
            for share, pixel in zip(shares, pixels, strict=True):
                assert 0 <= share[0].min() < share[0].max() <= 1
                np.testing.assert_allclose(pixel[0], share[0] * np.array(size * 2), rtol=1e-6)


def test_the_likeliest_proposals_do_not_overlap():
    boxes = np.array([[0, 0, 0.4, 0.4], [0, 0, 0.4, 0.45], [0.5, 0.5, 1, 1], [0.5, 0, 1, 0.4]], np.float32)
    regions = schema.Regions(boxes[None], np.eye(4)[None], np.array([[-1.0, -0.5, -3.0, -2.0]]))
    assert scores.likeliest(regions, 3).embed.argmax(-1).tolist() == [[1, 3, 2]]
    assert scores.likeliest(regions, 4).embed.argmax(-1).tolist() == [[1, 3, 2, 0]]
    assert scores.likeliest(regions, 2).prior.tolist() == [[-0.5, -2.0]]


def test_one_image_and_the_classes_of_its_boxes(predictor):
    single, boxes = PIL.Image.fromarray(PICTURES[0]), BOXES[0]
    (expected,) = predictor.encode_boxes(PICTURES[:1], [boxes])
    close([predictor.encode_boxes(single, boxes)], [expected])
    features = predictor.encode_text(TEXTS)
    classes = inference.ClassFeatures(("a", "b"), features, None)
    close([predictor.classify_boxes(single, boxes, classes)], [expected @ features.T])
    close(predictor.classify_boxes(PICTURES[:1], [boxes], classes), [expected @ features.T])
    assert predictor.encode_patches(single).shape == (predictor.grid, predictor.grid, 28)


FAULTS = {  # of the boxes of three images
    "boxes_xyxy: got boxes of 2 images, expected of 3, as many as images": [BOXES[0]] * 2,
    r"boxes_xyxy\[0\]: got \[0.0, 0.0, 20.0, 40.0\], .* divide": [[[0, 0, 20, 40]], [], []],
    r"boxes_xyxy\[1\]: .* expected x1 <= x2": [[], [[0.5, 0, 0.2, 1]], []],
    r"boxes_xyxy\[2\]: .* expected finite numbers": [[], [], [[0.5, 0, np.nan, 1]]],
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_of_boxes(predictor, message):
    with pytest.raises(inference.InputError, match=message):
        predictor.encode_boxes(PICTURES, FAULTS[message])


def test_a_map_of_a_box_head_asks_for_each_patch_and_the_regions(predictor):
    got = predictor.similarity_map(PICTURES[0], TEXTS)
    assert got.shape == (2, 5, 5)
    text = predictor.encode_text(TEXTS)
    tokens = predictor.encode_tokens(PICTURES[:1])
    close(predictor.similarity_maps(tokens, [text]), [got])
    cell = np.array([[3, 1, 4, 2]]) / 5  # column 3, row 1
    (embed,) = predictor.encode_boxes(PICTURES[:1], [cell])
    np.testing.assert_allclose(predictor.encode_patches(PICTURES[:1])[0, 1, 3], embed[0], atol=3e-6)
    around = np.array([[3, 1, 4, 2], [2, 0, 5, 3]]) / 5
    (both,) = predictor.encode_boxes(PICTURES[:1], [around])
    mean = both.sum(axis=0) / np.linalg.norm(both.sum(axis=0))
    patches = predictor.encode_patches(PICTURES[:1], sides=(1, 3))
    np.testing.assert_allclose(patches[0, 1, 3], mean, atol=3e-6)
    regions = predictor.encode_regions(PICTURES[:1])
    of_regions = scores.region_map(text @ regions.embed[0].T, regions.boxes_xyxy[0], 5)
    expected = ((text @ embed.T)[:, 0] + of_regions[:, 1, 3]) / 2
    np.testing.assert_allclose(got[:, 1, 3], expected, atol=3e-6)


def test_a_map_of_regions_has_the_best_of_those_that_cover_a_cell():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0, 1, 0.25], [0.9, 0.9, 1, 1]])
    got = scores.region_map(np.array([[0.5, 0.9, -0.1]]), boxes, 2)
    # Cells of a half. Region 0 covers the upper left cell, region 1 a quarter of it: -0.1 + 1.0 / 4 is less.
    np.testing.assert_allclose(got, [[[0.5, -0.1 + 1.0 / 2], [-0.1, -0.1]]], atol=3e-6)
    predictor = _predictor()
    regions = predictor.encode_regions(PICTURES[:1])
    cosines = predictor.encode_text(TEXTS) @ regions.embed[0].T
    expected = scores.region_map(cosines, regions.boxes_xyxy[0], 5)
    np.testing.assert_allclose(predictor.similarity_map(PICTURES[0], TEXTS), expected, atol=3e-6)


@pytest.mark.parametrize("pool", ["class", "map"])
def test_a_map_of_two_towers_pools_each_patch_alone(pool):
    predictor = _predictor(decoder=None, image__pool=pool)
    got = predictor.similarity_map(PICTURES[0], TEXTS)
    tokens = applied(predictor, "image_tokens", PICTURES[:1])
    patch = tokens[:, 1 + 7 : 1 + 8]  # row 1, column 2, after the class token
    # An image of this patch alone; a pooling over patches leaves out the first token.
    alone = patch if pool == "class" else np.concatenate([patch, patch], axis=1)
    (embed, *_) = applied(predictor, "embeddings", alone)
    expected = predictor.encode_text(TEXTS) @ np.asarray(embed[0])
    np.testing.assert_allclose(got[:, 1, 2], expected, atol=3e-6)
