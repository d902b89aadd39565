import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from grain_jax.core import images
from grain_jax.input_pipeline import order, transforms
from tests import tiny


@pytest.mark.parametrize("shape", [(375, 500), (500, 40), (1, 9), (64, 63), (30, 64), (64, 200)])
def test_resize_in_two_passes_is_tensorflows_resize_to_the_bit(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    pixels[pixels > 200], pixels[pixels < 50] = 255, 0  # to overshoot
    whole = tf.image.resize(pixels, (64, 64), "bicubic", antialias=True)
    expected = tf.saturate_cast(tf.round(whole), tf.uint8).numpy()
    np.testing.assert_array_equal(transforms.resize(tf.constant(pixels), 64).numpy(), expected)


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 // width, y * 200 // height, (x + y) % 100], -1).astype(np.uint8)


def encode(pixels, file_format, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "JPEG RGB", "JPEG L"])
def test_images_that_are_stored_as_they_are_decode_to_pils_pixels(mode):
    *file_format, mode = mode.split()
    file, alpha = io.BytesIO(), PIL.Image.linear_gradient("L").resize((70, 50))
    picture = PIL.Image.fromarray(smooth(70, 50)).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(alpha)
    picture.save(file, *file_format or ["PNG"], **(dict(transparency=3) if mode == "P" else {}))
    expected = images.decode_image(file.getvalue()).convert("RGB")
    np.testing.assert_array_equal(transforms.decode(tf.constant(file.getvalue())), expected)


def test_crops_keep_enough_of_the_picture():
    draws = order.uniforms(order.hash_key(5), np.arange(300), transforms.NUM_DRAWS)
    draws[:4] = np.array([[0], [1 - 2**-24], [0.5], [0.25]])
    shape = tf.constant([50, 70, 3])
    areas = []
    for d in draws:
        window, shares = transforms.crop_window(shape, tf.constant(d), 0.4)
        top, left, height, width = window.numpy()
        assert top >= 0 and left >= 0 and top + height <= 50 and left + width <= 70
        np.testing.assert_allclose(
            shares, [left / 70, top / 50, (left + width) / 70, (top + height) / 50], atol=1e-6
        )
        areas.append(height * width / 3500)
    assert min(areas) >= 0.4 and max(areas) == 1.0 and 0.65 < np.mean(areas) < 0.75


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_crop_is_a_window_of_the_picture(file_format):
    encoded = tf.constant(encode(smooth(70, 50), file_format))
    whole = transforms.decode(encoded).numpy()
    for position in range(5):
        draws = tf.constant(order.uniforms(order.hash_key(1), [position], transforms.NUM_DRAWS)[0])
        top, left, height, width = transforms.crop_window(tf.constant([50, 70, 3]), draws, 0.3)[0].numpy()
        image, _ = transforms.decode_cropped(encoded, draws, 0.3)
        expected = whole[top : top + height, left : left + width].astype(int)
        distance = np.abs(image.numpy() - expected)
        if file_format == "JPEG":  # colour is interpolated across the window's edge, seen or unseen
            assert distance.max() <= 16
            distance = distance[2:-2, 2:-2]
        assert distance.max() == 0


def test_boxes_follow_the_crop():
    boxes = tf.constant(
        [[0.3, 0.3, 0.5, 0.5], [0.1, 0.3, 0.4, 0.5], [0.0, 0.3, 0.3, 0.5], [0.0, 0.0, 0.1, 0.1]]
    )
    moved, kept = transforms.crop_boxes(boxes, tf.constant([0.2, 0.2, 0.7, 0.7]))
    np.testing.assert_allclose(moved[0], [0.2, 0.2, 0.6, 0.6], atol=1e-6)
    np.testing.assert_allclose(moved[1], [0.0, 0.2, 0.4, 0.6], atol=1e-6)  # two thirds are inside
    assert kept.numpy().tolist() == [True, True, False, False]


def caption(captions, synthetic, first, second, rate=0.5):
    fields = {"captions": tf.constant(captions, tf.string), "synthetic_caption": tf.constant(synthetic)}
    draws = tf.constant([first, second] + [0.0] * 5, tf.float32)
    return transforms.choose_caption(fields, draws, rate).numpy().decode()


def test_captions():
    assert caption(["a", "b", "c"], "s", 0.6, 0.5) == "b"
    assert caption(["a", "b", "c"], "s", 0.6, 0.99999994) == "c"
    assert caption(["a", "b"], "s", 0.4, 0.5) == "s"
    assert caption(["a", "b"], "", 0.4, 0.1) == "a"
    assert caption([], "s", 0.9, 0.1) == "s"
    assert caption(["", "b"], "s", 0.9, 0.1) == "b"
    assert caption(["a"], "s", 0.0, 0.1, rate=0.0) == "a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The LEFT wing", True),
        ("seen from\nits right-hand side", True),
        ("He left the room, all right", True),
        ("leftovers, copyright, upright, bright", False),
        ("", False),
    ],
)
def test_texts_that_mention_a_side(text, expected):
    fields = {"regions/negatives/ragged_flat_values": tf.constant(["a bird", text])}
    assert transforms.mentions_side(fields).numpy() == expected


def test_a_dropped_box_takes_its_description_along():
    fields = {
        "regions/description": tf.constant(["a", "b", "c", "d"]),
        "regions/score": tf.constant([0.5, 0.9, 0.5, 0.7]),
    }
    boxes = tf.constant([[0.0, 0.0, 0.2, 0.4]] * 4)
    kept = tf.constant([True, False, True, True])
    best = transforms.top_regions(fields, boxes, kept, 2)
    # a before c: equal scores keep their order.
    assert best["descriptions"].numpy().tolist() == [b"d", b"a"]
    np.testing.assert_allclose(best["region_boxes_cxcywh"], [[0.1, 0.2, 0.2, 0.4]] * 2, atol=1e-7)
    np.testing.assert_allclose(best["region_scores"], [0.7, 0.5])
    padded = transforms.top_regions(fields, boxes, kept, 5)
    assert padded["descriptions"].numpy().tolist() == [b"d", b"a", b"c", b"", b""]
    assert padded["region_mask"].numpy().tolist() == [True] * 3 + [False] * 2


_DRAWS = "captions captions image image image image image negatives".split()


def test_each_choice_has_a_draw_of_its_own():
    """Another value of one draw changes what that draw decides, and nothing else."""
    texts = lambda *each: tf.train.Feature(bytes_list=tf.train.BytesList(value=each))
    floats = lambda *each: tf.train.Feature(float_list=tf.train.FloatList(value=each))
    fields = {
        "image": texts(encode(smooth(70, 50), "PNG")),
        "captions": texts(b"a", b"b"),
        "synthetic_caption": texts(b"s"),
        "regions/bbox": floats(0.4, 0.4, 0.5, 0.5),
        "regions/description": texts(b"d"),
        "regions/score": floats(1.0),
        "regions/negatives/ragged_flat_values": texts(b"m", b"n"),
        "regions/negatives/ragged_row_lengths_0": tf.train.Feature(int64_list=tf.train.Int64List(value=[2])),
    }
    record = tf.train.Example(features=tf.train.Features(feature=fields)).SerializeToString()
    rates = dict(input__flip_rate=0.5, input__synthetic_caption_rate=0.5, input__crop_min_area=0.5)
    c = tiny.config(input__negatives_per_region=1, text__pack_rows=10, **rates)
    run = lambda draws: transforms.Transform(c)(tf.constant(record), tf.constant(draws, tf.float32))
    before = run(np.full(transforms.NUM_DRAWS, 0.6))
    for draw, column in enumerate(_DRAWS):
        after = run(np.where(np.arange(transforms.NUM_DRAWS) == draw, 0.3, 0.6))
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        expected = {column, "region_boxes_cxcywh"} if column == "image" else {column}
        assert changed == expected, draw
