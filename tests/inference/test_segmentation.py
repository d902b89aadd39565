"""Maps of classes and labels of pixels, against torch, transformers and plain loops."""

import functools
import itertools
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from grain_jax import inference
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.core import images as image_files
from grain_jax.inference import inputs, scores, segmentation
from grain_jax.inference.inputs import InputError
from tests import foreign, perturbed

torch.set_num_threads(1)
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3)).astype(np.uint8)
SMALL: Any = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
WORDS: Any = dict(vocab_size=300, max_position_embeddings=32, **SMALL)
VISION: Any = dict(image_size=40, patch_size=8, **SMALL)


@functools.cache
def _predictor(**changes):
    changes = dict(image__depth=1, text__depth=1) | changes
    model = perturbed.tiny(**changes)
    return inference.Predictor(model, perturbed.params(model))


def _classes(predictor, count=5, names=2):
    """Classes with random features; the first one has several names."""
    dim = predictor.model.embed_dim
    features = scores.unit(np.random.default_rng(3).normal(size=(count + names - 1, dim)))
    first = np.array([0, *range(names, count + names - 1)])
    return segmentation.Classes(tuple(f"class {i}" for i in range(count)), features, first)


def _ours(module, folder):
    """The same weights as a Predictor."""
    foreign.perturb(module).save_pretrained(folder)
    from_hf(folder, folder / "ours")
    return inference.load(folder / "ours")


def _values_by_torch(vision, images):
    """The tokens where in the last layer each one attends to itself alone."""
    before = vision(images, output_hidden_states=True).hidden_states[-2]
    layer = vision.encoder.layers[-1]
    attention = layer.self_attn
    x = before + attention.out_proj(attention.v_proj(layer.layer_norm1(before)))
    return vision.post_layernorm(x + layer.mlp(layer.layer_norm2(x)))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_values_are_those_of_transformers(kind, tmp_path):
    """MaskCLIP's maps of CLIP and of SigLIP, whose pooling attends to one patch alone."""
    module: Any
    if kind == "clip":
        texts = transformers.CLIPTextConfig(**WORDS, projection_dim=24, eos_token_id=299).to_dict()
        sight = transformers.CLIPVisionConfig(**VISION, projection_dim=24).to_dict()
        config = transformers.CLIPConfig(text_config=texts, vision_config=sight, projection_dim=24)
        module = transformers.CLIPModel(config)
    else:
        texts = transformers.SiglipTextConfig(**WORDS, projection_size=32).to_dict()
        sight = transformers.SiglipVisionConfig(**VISION).to_dict()
        module = transformers.SiglipModel(transformers.SiglipConfig(text_config=texts, vision_config=sight))
    ours = _ours(module.eval(), tmp_path)
    pixels = np.random.default_rng(1).normal(size=(2, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        vision = module.vision_model
        x = _values_by_torch(vision, foreign.torch_images(pixels))
        if kind == "clip":
            patches = module.visual_projection(x[:, 1:])
        else:
            patches = vision.head(x.reshape(-1, 1, 32)).reshape(2, 25, 32)
    classes = _classes(ours)
    expected = classes.cosines(patches.numpy()).transpose(0, 2, 1).reshape(2, 5, 5, 5)
    pixels = inputs.Normalized(pixels)
    got = ours.class_maps(pixels, classes, by="patches", patch_features="values")
    np.testing.assert_allclose(got, expected, atol=1e-5)
    tokens = ours.class_maps(pixels, classes, patch_features="tokens")
    np.testing.assert_allclose(
        tokens, classes.cosines(ours.encode_patches(pixels)).transpose(0, 3, 1, 2), atol=1e-6
    )
    assert np.abs(got - tokens).max() > 1e-3


def test_ways_of_a_model_with_queries_and_a_box_head():
    predictor: Any = _predictor(boxes__kind="roi_align", decoder__depth=1)
    classes = _classes(predictor)
    maps = lambda **options: predictor.class_maps(PICTURES, classes, **options)
    patches, regions, both = maps(by="patches"), maps(by="regions"), maps()
    np.testing.assert_allclose(both, (patches + regions) / 2, atol=1e-6)
    weighted = maps(by="both", patch_weight=0.25)
    np.testing.assert_allclose(weighted, 0.25 * patches + 0.75 * regions, atol=1e-6)
    around = classes.cosines(predictor.encode_patches(PICTURES, sides=(1, 2, 3)))
    np.testing.assert_allclose(patches, around.transpose(0, 3, 1, 2), atol=1e-6)
    values = predictor.class_maps(PICTURES, classes, by="patches", patch_features="values")
    assert np.abs(values - patches).max() > 1e-3
    each = (picture for picture in PICTURES)
    mixed = predictor.class_maps(each, classes, by="both", patch_features="values")
    np.testing.assert_allclose(mixed, (values + regions) / 2, atol=1e-6)


def test_a_class_has_the_best_of_its_names():
    features = np.eye(3, dtype=np.float32)
    classes = segmentation.Classes(("a, b", "c"), features, np.array([0, 2]))
    np.testing.assert_allclose(
        classes.cosines(np.array([[3.0, 4, 0], [0, 0, 2]])), [[0.8, 0], [0, 1]], atol=1e-6
    )
    assert segmentation.alternatives("sofa,  couch,") == ["sofa", "couch"]
    asked = []
    encode = lambda texts: asked.extend(texts) or np.ones((len(texts), 2), np.float32)
    made = segmentation.embed_classes(
        encode, ["sofa, couch", "cat"], ["a {}", "{}"], [["soft"], []], unit_length=True
    )
    assert made.first.tolist() == [0, 2] and made.names == ("sofa, couch", "cat")
    assert asked[:2] == ["a sofa, which has soft", "sofa, which has soft"]
    assert asked[-2:] == ["a cat", "cat"]
    np.testing.assert_allclose(np.linalg.norm(made.features, axis=1), 1, atol=1e-6)


def _by_loops(image, size, short, stride, maps_of, count):
    """The canvas of an image by torch and plain loops, [C, H, W] of the image's size."""
    width, height = image.size
    rows, columns = (max(short, round(x * short / min(width, height))) for x in (height, width))
    pixels = np.asarray(image.resize((columns, rows), PIL.Image.Resampling.BICUBIC))
    total, times = np.zeros((count, rows, columns)), np.zeros((rows, columns))
    starts = lambda length: [*range(0, length - size, stride), length - size]
    for y, x in itertools.product(starts(rows), starts(columns)):
        single = torch.tensor(maps_of(pixels[y : y + size, x : x + size]))
        large = torch.nn.functional.interpolate(single[None], (size, size), mode="bilinear")
        total[:, y : y + size, x : x + size] += large[0].numpy()
        times[y : y + size, x : x + size] += 1
    mean = torch.tensor(total / times)[None]
    resized = torch.nn.functional.interpolate(mean, (height, width), mode="bilinear")
    return resized[0].numpy()


@pytest.mark.parametrize(
    "width, height, short, stride", [(61, 37, 20, 7), (13, 50, 16, 16), (16, 16, 16, 5), (9, 5, 31, 9)]
)
def test_windows_are_those_of_plain_loops(width, height, short, stride, monkeypatch):
    random = np.random.default_rng(width)
    image = PIL.Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
    mix = random.normal(size=(6, 3)).astype(np.float32)

    def maps_of(window):  # means of 4 x 4 pixels, mixed: [6, 4, 4]
        means = window.reshape(4, 4, 4, 4, 3).mean((1, 3)) / 255
        return np.einsum("cd,yxd->cyx", mix, means).astype(np.float32)

    windows = segmentation.cut(image, 16, short, stride)
    maps = np.stack([maps_of(window) for window in windows.pixels])
    expected = _by_loops(image, 16, short, stride, maps_of, 6)
    got = segmentation.labels(maps, windows)
    top = np.sort(expected, axis=0)
    clear = top[-1] - top[-2] > 1e-5
    assert got.shape == (height, width) and clear.mean() > 0.95
    np.testing.assert_array_equal(got[clear], expected.argmax(0)[clear])
    # In bands of rows the same; and the numbers themselves.
    monkeypatch.setattr(segmentation, "_BAND", 1)
    np.testing.assert_array_equal(segmentation.labels(maps, windows), got)
    canvas = segmentation._overlapped(maps, windows)
    bands = np.concatenate(list(segmentation._resized(canvas, width, height)))
    np.testing.assert_allclose(bands.transpose(2, 0, 1), expected, atol=1e-5)
    # The background: the share of the best class among the others, without one that is skipped.
    shares = torch.softmax(20 * torch.tensor(np.delete(expected, 2, 0)), 0).numpy().max(0)
    got = segmentation.labels(maps, windows, background=0.6, scale=20, skip=2)
    sure = np.abs(shares - 0.6) > 1e-3
    np.testing.assert_array_equal((got == -1)[sure], (shares < 0.6)[sure])
    assert not (got == 2).any()


def test_segment():
    predictor = _predictor(decoder=None, image__pool="class")
    classes = _classes(predictor, names=1)
    large = PIL.Image.fromarray(np.tile(PICTURES[0], (2, 3, 1))[:71, :97])
    got = predictor.segment([large, PICTURES[1]], classes, stride=30)
    assert [x.shape for x in got] == [(71, 97), (40, 40)] and got[0].dtype == np.int32
    # An image of the model's size is one window, whose maps are enlarged.
    (maps,) = predictor.class_maps(PICTURES[1:], classes)
    expected = scores.resize_map(maps, 40, 40).argmax(0)
    assert (got[1] == expected).mean() > 0.999
    np.testing.assert_array_equal(predictor.segment(PICTURES[1], classes), got[1])
    np.testing.assert_array_equal(predictor.segment(PICTURES[1] / np.float32(255), classes), got[1])
    assert (predictor.segment(PICTURES[1], classes, background=1.0) == -1).all()


def test_what_a_model_cannot_do_and_images_that_cannot_be_used():
    two, regions = _predictor(decoder=None, image__pool="class"), _predictor()
    with pytest.raises(InputError, match=r"^images\[1\]: got int64 \[40, 40, 3\]"):
        two.segment([PICTURES[0], PICTURES[1].astype(np.int64)], _classes(two))
    wrong = [(two, "by", "patch"), (two, "patch_features", "value"), (two, "by", "regions")]
    wrong += [(two, "short_side", 39), (two, "stride", 41), (regions, "by", "patches")]
    for predictor, name, value in wrong:
        with pytest.raises(InputError, match=f"^{name}: got {value!r}[^\n]*$"):
            predictor.segment(PICTURES[0], _classes(predictor), **{name: value})
    thin, plain = PIL.Image.new("1", (4000, 2)), PIL.Image.new("1", (20, 20))
    with pytest.raises(image_files.TooLargeError, match="which become 100000 x 50, .* 1 classes$"):
        segmentation.cut(thin, 50)
    with pytest.raises(image_files.TooLargeError, match="at most 1,048,576 .* of 512 .*short_side"):
        segmentation.cut(plain, 16, 1025, classes=512)
    assert segmentation.cut(plain, 512, 1024, 512, 512).canvas == (1024, 1024)
