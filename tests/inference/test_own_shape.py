"""Images in their own shape through a Predictor: each is seen as it would be alone, on its own grid."""

import dataclasses
import functools
import json

import jax
import numpy as np
import PIL.Image
import pytest

import grain_jax
from grain_jax import inference
from grain_jax.convert import arguments as export
from grain_jax.convert import output
from grain_jax.core import errors, patches
from grain_jax.core.schema import Patches
from grain_jax.data.annotate import arguments as annotate
from grain_jax.demo import arguments as demo
from grain_jax.evaluate import arguments as evaluate
from grain_jax.evaluate import segmentation as evaluation
from grain_jax.inference import scores, segmentation
from grain_jax.models import grain
from grain_jax.runtime import checkpoint, saved_model
from tests import perturbed

SHAPES = [(24, 60), (40, 40), (70, 16)]  # height, width
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in SHAPES]
LENGTH = 12
TEXTS = np.array([[298, 5, 6, 299], [298, 7, 299, 0]], np.int32)
BOXES = [np.array([[0.1, 0.2, 0.8, 0.9], [0.0, 0.0, 1.0, 1.0]], np.float32)] * 3


@functools.cache
def _predictor(length=LENGTH, **changes):
    model = perturbed.tiny(image__depth=1, text__depth=1, decoder__depth=1, **changes)
    return inference.Predictor(model, perturbed.params(model), sequence_length=length)


@pytest.fixture
def predictor():
    return _predictor(boxes__kind="roi_align")


def by_hand(predictor, method, image, *given):
    """What the module returns of one image, of exactly the patches of its grid."""
    one = patches.of_image(image, predictor.model.image.patch_size, LENGTH)
    exact = Patches(one.pixels[None, : one.grid.prod()], one.grid[None])
    apply = jax.jit(grain.GRAIN(predictor.model).apply, static_argnames="method")
    return apply({"params": predictor.params}, exact, *given, method=method)


def test_an_image_in_a_batch_is_what_it_is_alone(predictor):
    image, regions = predictor.encode_image_and_regions(PICTURES)
    boxes = predictor.encode_boxes(PICTURES, BOXES)
    for i in (0, 2):
        given = PICTURES[i], BOXES[i][None]
        expected, of_boxes = by_hand(predictor, "encode_image_and_boxes", *given)
        np.testing.assert_allclose(image[i], expected[0], atol=1e-5)
        np.testing.assert_allclose(boxes[i], of_boxes[0], atol=1e-5)
    expected, of_regions, _ = by_hand(predictor, "encode_image", PICTURES[0])
    np.testing.assert_allclose(regions.embed[0], of_regions[0], atol=1e-5)
    # Prepared images, their tokens and one image give the same.
    ready = [predictor.preprocess(PIL.Image.fromarray(x)) for x in PICTURES]
    assert ready[0].pixels.dtype == np.float32 and ready[0].pixels.shape[0] == LENGTH
    np.testing.assert_allclose(predictor.encode_image(ready), image, atol=1e-5)
    np.testing.assert_allclose(predictor.encode_image(patches.stack(ready)), image, atol=1e-5)
    np.testing.assert_allclose(predictor.encode_image(ready[1]), image[1], atol=1e-5)
    tokens = predictor.encode_tokens(PICTURES)
    assert tokens.grid.tolist() == [x.grid.tolist() for x in ready]
    np.testing.assert_allclose(predictor.encode_image(tokens), image, atol=1e-5)
    assert predictor.encode_image([]).shape == (0, image.shape[1])
    assert f"of {LENGTH} patches in its own shape" in repr(predictor)


def test_maps_have_the_grid_of_their_image(predictor):
    maps = predictor.encode_patches(PICTURES)
    for picture, found in zip(PICTURES, maps, strict=True):
        one = predictor.preprocess(picture)
        assert found.shape[:2] == tuple(one.grid)
        y, x = one.grid[0] - 1, one.grid[1] - 1  # the last patch as a box
        corner = np.array([[x, y, x + 1, y + 1]] / np.tile(one.grid[::-1], 2), np.float32)
        np.testing.assert_allclose(
            found[y, x], predictor.encode_boxes(picture, corner)[0], atol=1e-5
        )
    text = predictor.encode_text(TEXTS)
    similar = predictor.similarity_maps(PICTURES, [text] * 3)
    regions = predictor.encode_regions(PICTURES)
    for i, found in enumerate(similar):
        seen = np.einsum("nd,hwd->nhw", text, maps[i])
        pair = text @ regions.embed[i].T, regions.boxes_xyxy[i]
        expected = (seen + scores.region_map(*pair, maps[i].shape[:2])) / 2
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_region_fills_the_cells_of_its_box():
    found = scores.region_map(np.array([[1.0, 0.0]]), [[0.5, 0, 1, 1], [0, 0, 0, 0]], (2, 4))
    np.testing.assert_allclose(found, [[[0, 0, 1, 1], [0, 0, 1, 1]]], atol=1e-6)


def test_segmentation_sees_the_whole_image(predictor):
    classes = segmentation.Classes(("a", "b"), predictor.encode_text(TEXTS), np.arange(2))
    labels = predictor.segment(PICTURES, classes)
    assert [x.shape for x in labels] == SHAPES
    maps = predictor.class_maps(PICTURES, classes)
    for found, own in zip(labels, maps, strict=True):
        large = scores.resize_map(own, *found.shape[::-1])
        agree = large.argmax(axis=0) == found
        assert agree[np.abs(large[0] - large[1]) > 1e-5].all()
    # The same as an evaluation, of a batch.
    entry = evaluation.Segmentation(images="x", masks="y", classes="z")
    segmenter = evaluation.Segmenter(entry, predictor, classes, None)
    cut = segmenter.cutter(predictor.model.image.image_size)
    windows = [cut(PIL.Image.fromarray(x)) for x in PICTURES]
    for found, expected in zip(segmenter.labels(windows), labels, strict=True):
        assert (found == expected).mean() > 0.99
    # An image of any size: its map is small.
    large = PIL.Image.fromarray(PICTURES[0]).resize((2400, 2000))
    assert predictor.segment(large, classes).shape == (2000, 2400)
    with pytest.raises(inference.InputError, match="short_side, stride: got 0, 4 with a model"):
        predictor.segment(PICTURES, classes, stride=4)


def test_what_cannot_be_is_one_line(predictor):
    numbers = 3 * predictor.model.image.patch_size**2
    for images, fault in (
        (np.zeros((2, 8, 8, 3), np.float32), "images: got float32, expected uint8 or PIL images"),
        (
            [np.zeros((8, 8, 3), np.float32)],
            r"images\[0\]: got float32 \[8, 8, 3\], expected a PIL",
        ),
        ([PICTURES[0], "x"], r"images\[1\]: got str, expected a PIL image, uint8 \[H, W, 3\], or"),
        ([Patches(np.zeros((4, 5)), np.ones(2))], r"images\[0\]: got patches \[4, 5\]"),
    ):
        with pytest.raises(inference.InputError, match=fault):
            predictor.encode_image(images)
    mixed = [Patches(np.zeros((n, numbers), np.uint8), np.array([1, n], np.int32)) for n in (4, 5)]
    with pytest.raises(inference.InputError, match=r"lengths \[4, 5\], expected one length a call"):
        predictor.encode_image(mixed)
    squares = _predictor(0, boxes__kind="roi_align")
    with pytest.raises(inference.InputError, match="images: got patches, expected images of a"):
        squares.encode_image(patches.stack(mixed[:1]))
    with pytest.raises(inference.InputError, match=r"sequence_length: got \(-1,\), expected"):
        _predictor(-1)


def test_a_stored_model_knows_its_lengths(predictor, tmp_path):
    params = jax.device_get(predictor.params)
    saved_model.save_model(tmp_path, predictor.model, params, sequence_lengths=(4, LENGTH))
    loaded = grain_jax.load(tmp_path)
    assert loaded.sequence_length == LENGTH
    np.testing.assert_array_equal(loaded.encode_image(PICTURES), predictor.encode_image(PICTURES))
    short = grain_jax.load(tmp_path, sequence_length=4)
    assert short.sequence_length == 4
    squares = grain_jax.load(tmp_path, sequence_length=0)
    # The model is the same, and what it sees is not.
    described = json.loads((tmp_path / "config.json").read_text())
    assert squares.digests == {x: described["digests"][x] for x in ("model", "params")}
    assert short.digests == squares.digests | {"sequence_length": "4"}
    assert len({x.digest for x in (loaded, short, squares)}) == 3
    assert output._digest(checkpoint.load_stored(tmp_path)) == loaded.digest  # of conversions
    size = predictor.model.image.image_size
    assert squares.preprocess(PICTURES[0]).shape == (size, size, 3)
    assert dataclasses.asdict(squares.model) == dataclasses.asdict(predictor.model)
    for lengths in ({"sequence_lengths": [4, 9]}, {"sequence_lengths": []}):
        (tmp_path / "config.json").write_text(json.dumps(described | lengths))
        with pytest.raises(checkpoint.CheckpointError, match="sequence_lengths: not what config"):
            grain_jax.load(tmp_path)
    saved_model.save_model(tmp_path, predictor.model, params)
    assert grain_jax.load(tmp_path, sequence_length=0).digests == squares.digests
    said = (
        f"^sequence_length: got 4 with {tmp_path}, which was trained with squares; expected 0, or"
    )
    with pytest.raises(inference.InputError, match=said):
        grain_jax.load(tmp_path, sequence_length=4)


def test_commands_that_load_a_model_take_the_length():
    model, out = "--checkpoint=x", "--output=y"
    for command, words in (
        (evaluate.Evaluate, ["zeroshot", model, "--images=z", out]),
        (evaluate.Evaluate, ["suite", model, "--config=eval", out]),
        (export.Export, [model, out]),
        (demo.Demo, [model]),
        (annotate.Annotate, ["--model=x", "--images=z", out]),
    ):
        assert command.parse(words).sequence_length is None
        assert command.parse([*words, "--sequence-length", "9"]).sequence_length == 9
        with pytest.raises(errors.UserError, match="--sequence-length: got '-1', expected a whole"):
            command.parse([*words, "--sequence-length=-1"])
    with pytest.raises(errors.UserError, match="--sequence-length: got no --model, expected the"):
        annotate.Annotate.parse(["--images=z", out, "--sequence-length=9"])
