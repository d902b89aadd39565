import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import grain_jax
from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import images, schema
from grain_jax.inference import prompts, scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain
from grain_jax.runtime import checkpoint
from tests import perturbed, tiny

S, Q, D = 16, 5, 16


@pytest.fixture(scope="module")
def predictor():
    c = tiny.config(model__embed_dim=D)
    templates = ["a photo of a {}", "one {}."]
    return inference.Predictor(c.model, perturbed.params(c.model), templates=templates)


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory):
    """A folder with a two-tower model whose text tower sees its padding, and its tokenizer beside it."""
    c = tiny.dictionary(model__embed_dim=D)
    c.model.decoder = None
    c.model.image.update(pool="map", depth=1, class_token=False)
    c.model.image.update(pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.5, 0.6, 0.7))
    c.model.text.update(causal=False, pool="map", depth=1, pad_id=1, vocab_size=12)
    c.model.text.update(tokenizer="tokenizer.json", cleaning="canonical")
    c.input.max_regions = 0
    c.text.packing = False
    c = config_lib.from_dict(c)
    folder = tmp_path_factory.mktemp("two_towers") / "model"
    checkpoint.save_model(folder, c.model, perturbed.params(c.model), source="test")
    perturbed.write_words(folder, "<unk> </s> a photo of wren with long orange beak")
    return folder


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (70, S, S, 3)).astype(np.uint8)


def cut_off():
    """An image whose file ends too early, which PIL notices when its pixels are read."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    PIL.Image.fromarray(noise).save(file, "JPEG")
    return PIL.Image.open(io.BytesIO(file.getvalue()[:-500]))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_all_kinds_of_pictures_agree(predictor, pictures):
    few = pictures[:3]
    expected = predictor.encode_image(few)
    assert expected.dtype == np.float32 and expected.shape == (3, D)
    close(np.linalg.norm(expected, axis=1), 1)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    close(predictor.encode_image([PIL.Image.fromarray(p) for p in few]), expected)
    close(predictor.encode_image(list(few)), expected)
    close(predictor.encode_image(schema.rescale_pixels(few)), expected)
    large = np.random.default_rng(1).integers(0, 256, (3, 40, 25, 3)).astype(np.uint8)
    resized = np.stack([images.resize(PIL.Image.fromarray(p), S) for p in large])
    close(predictor.encode_image(large), predictor.encode_image(resized))
    # What is preprocessed goes with others.
    first, second, third = (PIL.Image.fromarray(p) for p in few)
    ready = predictor.preprocess(second)
    assert ready.dtype == np.float32 and ready.shape == (S, S, 3)
    close(ready, schema.rescale_pixels(few[1]))
    np.testing.assert_array_equal(predictor.preprocess(ready), ready)
    close(predictor.encode_image([first, ready, third]), expected)


@pytest.mark.parametrize(
    "call, shapes",
    [
        (lambda p, x: p.encode_image(x), [(D,)]),
        (lambda p, x: p.encode_regions(x), [(Q, 4), (Q, D)]),
        (lambda p, x: p.encode_image_and_regions(x), [(D,), (Q, 4), (Q, D)]),
        (lambda p, x: p.classify(x, {"wren": ["a tail"], "kite": ["wings"]}, 0.5), [(2,)]),
    ],
    ids=["image", "regions", "both", "classify"],
)
def test_one_image_gives_what_belongs_to_it(predictor, pictures, call, shapes):
    expected = [leaf[0] for leaf in jax.tree.leaves(call(predictor, pictures[:1]))]
    picture = PIL.Image.fromarray(pictures[0])
    for one in (picture, pictures[0], predictor.preprocess(picture)):
        got = jax.tree.leaves(call(predictor, one))
        assert [x.shape for x in got] == shapes
        for a, b in zip(got, expected):
            close(a, b)


def test_one_text_gives_what_belongs_to_it(predictor, pictures):
    embed = predictor.encode_text(["a wren"])
    ids = predictor.tokenizer("a wren")
    assert ids.dtype == np.int32 and ids.shape == (32,)
    for one in ("a wren", ids):
        close(predictor.encode_text(one), embed[0])
    texts = ["a wren", "wren " * 40]
    np.testing.assert_array_equal(
        predictor.tokenizer(t for t in texts), tokenizer.ClipTokenizer()(texts, 32)
    )
    one, (same,) = (predictor.ground(pictures[0], x) for x in ("a wren", ["a wren"]))
    assert one.score == same.score and one.box_xyxy.shape == (4,)
    assert predictor.similarity_map(pictures[0], "a wren").ndim == 2


def test_a_model_says_what_it_is(predictor, two_towers):
    assert predictor.logit_scale == pytest.approx(np.exp(predictor.params["logit_scale"]))
    assert predictor.logit_bias is None
    biased = inference.Predictor(predictor.model, {**predictor.params, "logit_bias": -2.5})
    assert biased.logit_bias == -2.5
    count = sum(x.size for x in jax.tree.leaves(predictor.params))
    said = repr(predictor)
    for part in ("given parameters", f"image {S} x {S} (vit", f"{Q} regions", f"{count:,} param"):
        assert part in said
    loaded = grain_jax.load(str(two_towers))
    assert str(two_towers) in repr(loaded) and "; 0 regions;" in repr(loaded)
    ids = loaded.tokenizer(["wren", "a photo"])
    close(loaded.encode_text(ids), loaded.encode_text(["wren", "a photo"]))


def test_the_size_of_a_call_does_not_matter(predictor, pictures):
    image, regions = predictor.encode_image_and_regions(pictures)
    assert image.shape == (70, D)
    assert regions.embed.shape == (70, Q, D) and regions.boxes_xyxy.shape == (70, Q, 4)
    for some in (slice(0, 1), slice(67, 70)):
        close(predictor.encode_image(pictures[some]), image[some])
        part = predictor.encode_regions(pictures[some])
        close(part.embed, regions.embed[some])
        close(part.boxes_xyxy, regions.boxes_xyxy[some])
    assert predictor.encode_image([]).shape == (0, D)
    assert predictor.encode_text([]).shape == (0, D)


def test_a_large_call_is_shared_out_among_the_devices(predictor, pictures):
    used = []

    def program(params, image):
        used.append((params["logit_scale"].sharding.device_set, image.sharding, image.shape))
        return image

    many = np.concatenate([pictures] * 4)[:200]
    got = predictor._run(program, many)
    np.testing.assert_array_equal(got, many)
    (devices, sharding, shape) = used[0]
    assert devices == set(jax.devices()) and len(devices) == 8
    assert shape[0] == 8 * 32 and sharding.shard_shape(shape)[0] == 32
    texts = [f"a wren with {n} eggs" for n in range(100)]
    close(predictor.encode_text(texts)[98:], predictor.encode_text(texts[98:]))
    params, sharding = predictor._on_all_devices
    rows = jax.device_put(np.zeros((128, 16), np.int32), sharding)
    ends = jax.device_put(np.zeros(128, np.int32), sharding)
    program = predictor._encode_texts.lower(params, rows, ends).compile().as_text()
    assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", program)
    # Where a caller has spread the parameters, they stay.
    mesh = jax.sharding.Mesh(jax.devices(), "x")
    placed = jax.device_put(
        predictor.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    other = inference.Predictor(predictor.model, placed)
    close(other.encode_image(pictures[:3]), predictor.encode_image(pictures[:3]))
    assert "_on_all_devices" not in other.__dict__


def test_pictures_and_texts_from_a_generator(predictor, pictures, monkeypatch):
    taken = []

    def one_by_one():
        for i, picture in enumerate(pictures):
            taken.append(i)
            yield PIL.Image.fromarray(picture) if i % 2 else picture

    monkeypatch.setattr("grain_jax.inference.predictor.MAX_BATCH", 4)
    seen = []
    found = lambda program, rows: seen.append(len(taken)) or (rows[:, 0, 0],) * 3
    monkeypatch.setattr(predictor, "_run", found)
    got = predictor.encode_image(one_by_one())
    monkeypatch.undo()
    assert seen == [32, 64, 70]  # no more are held than run at once: 4 on each of 8 devices
    np.testing.assert_array_equal(got, pictures[:, 0, 0])
    texts = ["a wren", "a red kite"]
    close(predictor.encode_text(t for t in texts), predictor.encode_text(texts))
    few = pictures[:3]
    close(predictor.classify((p for p in few), (t for t in texts)), predictor.classify(few, texts))


def test_pil_pictures_of_every_mode(predictor):
    ramp = np.linspace(0, 255, 30 * 20).reshape(30, 20).astype(np.uint8)
    colours = np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1)
    grey, rgb = PIL.Image.fromarray(ramp), PIL.Image.fromarray(colours)
    palette = rgb.quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes([0, 128])
    deep = (ramp.astype(np.uint16) << 8) | 77
    clear = rgb.copy()
    clear.putalpha(grey)
    pairs = [
        (grey, grey.convert("RGB")),
        (grey.convert("1"), grey.convert("1").convert("RGB")),
        (palette, palette.convert("RGB")),
        (transparent, palette.convert("RGB")),
        (clear, rgb),  # as in training, transparent pixels keep their colour
        (grey.convert("LA"), grey.convert("RGB")),
        (rgb.convert("CMYK"), rgb),
        (rgb.convert("YCbCr"), rgb.convert("YCbCr").convert("RGB")),
        (PIL.Image.fromarray(deep), grey.convert("RGB")),
        (PIL.Image.fromarray(deep.astype(np.int32)), grey.convert("RGB")),
        (PIL.Image.fromarray(ramp.astype(np.int32)), grey.convert("RGB")),
    ]
    assert {given.mode for given, _ in pairs} >= {"I;16", "I", "P", "CMYK", "RGBA", "LA", "1"}
    (got,) = predictor._rows([given for given, _ in pairs])
    np.testing.assert_array_equal(got, [images.resize(same, S) for _, same in pairs])


def test_progress_is_shown_where_it_is_asked_for(predictor, pictures, capsys):
    predictor.encode_image(pictures[:3])
    assert capsys.readouterr().err == ""
    inference.Predictor(predictor.model, predictor.params, progress=True).encode_image(pictures)
    assert f"images: {len(pictures)}/{len(pictures)}, " in capsys.readouterr().err


def test_a_decoder_without_queries_has_no_regions(pictures):
    c = tiny.config(model__embed_dim=D, model__decoder__queries=0, input__max_regions=0)
    other = inference.Predictor(c.model, perturbed.params(c.model))
    shapes = jax.eval_shape(other._encode_images, other.params, pictures[:2])
    assert [x.shape for x in shapes] == [(2, D), (2, 0, D), (2, 0, 4)]
    said = r"^ground: the model has no region queries \(model.decoder.queries is 0\), expected"
    with pytest.raises(inference.InputError, match=said):
        other.ground(pictures[0], ["wren"])
    with pytest.raises(inference.InputError, match="^alpha 0.5: the model has no region queries"):
        other.classify(pictures[:1], {"a": ["b"]}, alpha=0.5)


def test_regions_are_the_models_last_layer(predictor, pictures):
    few = schema.rescale_pixels(pictures[:3])
    apply = jax.jit(grain.GRAIN(predictor.model).apply, static_argnames="method")
    variables = {"params": predictor.params}
    image, region, boxes = apply(variables, few, method=grain.GRAIN.encode_image)
    regions = predictor.encode_regions(few)
    close(regions.embed, region)
    close(predictor.encode_image(few), image)
    cx, cy, w, h = np.moveaxis(np.asarray(boxes[-1]), -1, 0)
    corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=-1)
    close(regions.boxes_xyxy, corners.clip(0, 1))
    assert regions.boxes_xyxy.min() >= 0 and regions.boxes_xyxy.max() <= 1


def test_texts_keep_their_order_whatever_their_length(predictor):
    texts = [" ".join(["wren"] * n) for n in (40, 1, 18, 3)] + ["a photo of a wren"]
    embed = predictor.encode_text(texts)
    assert embed.shape == (5, D) and embed.dtype == np.float32
    close(np.linalg.norm(embed, axis=1), 1)
    tokens = tokenizer.ClipTokenizer()(texts, 32)
    close(predictor.encode_text(tokens), embed)
    apply = jax.jit(grain.GRAIN(predictor.model).apply, static_argnames="method")
    for i in range(5):
        positions = np.arange(32)[None, None]
        (alone,) = apply(
            {"params": predictor.params},
            tokens[i][None, None],
            positions,
            np.ones_like(positions),
            np.array([[0, tokens[i].argmax()]]),
            method=grain.GRAIN.encode_text,
        )
        close(embed[i], alone[0])
    assert np.abs(embed[1] - embed[3]).max() > 0.01


def test_classify_names_and_descriptions(predictor, pictures):
    few = pictures[:4]
    classes = {"wren": ["a short tail", "brown wings"], "red kite": ["has a forked tail"]}
    image, regions = predictor.encode_image_and_regions(few)
    for described in (False, True):
        means = []
        for name, descriptions in classes.items():
            texts = prompts.class_texts(
                name, predictor.templates, descriptions if described else None
            )
            means.append(predictor.encode_text(texts).mean(axis=0))
        expected = image @ np.stack(means).T
        got = predictor.classify(few, classes if described else list(classes))
        assert got.shape == (4, 2) and got.dtype == np.float32
        close(got, expected)
    region = np.empty((4, 2))
    for c, descriptions in enumerate(classes.values()):
        similarity = regions.embed @ predictor.encode_text(descriptions).T
        region[:, c] = similarity.max(axis=2).mean(axis=1)
    close(predictor.classify(few, classes, alpha=0.25), 0.25 * expected + 0.75 * region)
    close(predictor.classify(few, predictor.class_features(classes), alpha=0.0), region)
    assert np.abs(scores.unit(means) - np.stack(means)).max() > 1e-3  # the mean is not renormalised


def test_ground_finds_the_best_region(predictor, pictures):
    texts = ["a long orange beak", "a short tail", "wing"]
    answers = predictor.ground(PIL.Image.fromarray(pictures[0]), texts)
    regions = predictor.encode_regions(pictures[:1])
    similarity = predictor.encode_text(texts) @ regions.embed[0].T
    assert len(answers) == 3
    for answer, row in zip(answers, similarity):
        close(answer.box_xyxy, regions.boxes_xyxy[0, row.argmax()])
        close(answer.score, row.max())
    for again in (pictures[0], schema.rescale_pixels(pictures[0])):
        other = predictor.ground(again, texts)
        close([a.score for a in other], [a.score for a in answers])


def test_parameters_stay_where_they_are_and_programs_are_shared(predictor, pictures):
    other = inference.Predictor(predictor.model, predictor.params)
    for mine, given in zip(jax.tree.leaves(other.params), jax.tree.leaves(predictor.params)):
        assert mine is given
    predictor.encode_image(pictures[:4])
    programs = predictor._encode_images._cache_size()
    doubled = inference.Predictor(predictor.model, jax.tree.map(lambda x: 2 * x, predictor.params))
    for n in (3, 4):
        own, twice = (x.encode_image(pictures[:n]) for x in (other, doubled))
        assert np.abs(own - twice).max() > 1e-3
    assert predictor._encode_images._cache_size() == programs


def test_bfloat16_is_near(predictor, pictures):
    half = inference.Predictor(predictor.model, predictor.params, dtype="bfloat16")
    image = half.encode_image(pictures[:4])
    assert image.dtype == np.float32
    difference = np.abs(image - predictor.encode_image(pictures[:4])).max()
    assert 0 < difference < 0.1


def test_load_reads_what_save_model_wrote(predictor, pictures, tmp_path):
    checkpoint.save_model(tmp_path / "model", predictor.model, predictor.params, source="test")
    loaded = grain_jax.load(str(tmp_path / "model"))
    assert loaded.model == predictor.model
    np.testing.assert_array_equal(
        loaded.encode_image(pictures[:3]), predictor.encode_image(pictures[:3])
    )
    with pytest.raises(checkpoint.CheckpointError, match="no such folder"):
        grain_jax.load(str(tmp_path / "none"))


def test_two_towers_that_see_their_padding(two_towers, pictures):
    loaded = grain_jax.load(str(two_towers))
    assert loaded.model.decoder is None and not loaded.model.text.packable
    apply = jax.jit(grain.GRAIN(loaded.model).apply, static_argnames="method")
    variables = {"params": loaded.params}
    few = pictures[:3]
    normalised = (few / 255 - np.array((0.5, 0.4, 0.3))) / np.array((0.5, 0.6, 0.7))
    image, _, _ = apply(variables, normalised.astype(np.float32), method=grain.GRAIN.encode_image)
    assert np.abs(image[0] - image[1]).max() > 0.01
    close(loaded.encode_image(few), image)
    close(loaded.encode_image(normalised.astype(np.float32)), image)

    texts = ["A long, orange beak!", "wren", " ".join(["photo"] * 40)]
    ids = np.full((3, 32), 1, np.int32)  # padded with model.text.pad_id to the whole context
    ids[0, :4], ids[1, 0], ids[2] = (2, 7, 8, 9), 5, 3
    positions = np.broadcast_to(np.arange(32), (1, 3, 32))
    at = np.stack([np.arange(3), np.zeros(3, np.int64)], axis=1)
    ones = np.ones_like(positions)
    method = grain.GRAIN.encode_text
    (expected,) = apply(variables, ids[None], positions, ones, at, method=method)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    close(loaded.encode_text(texts), expected)
    close(loaded.encode_text(ids), expected)
    close(loaded.encode_text(ids[:2, :6]), expected[:2])
    assert loaded.encode_text([]).shape == (0, D) and loaded.encode_image([]).shape == (0, D)
    classes = inference.ClassFeatures(("beak", "wren"), np.asarray(expected[:2]), None)
    close(loaded.classify(few, classes), image @ expected[:2].T)


def test_texts_of_a_tokenizer_file_end_at_their_last_token(tmp_path, two_towers, predictor):
    # The end token need not be the highest id, as it is in CLIP.
    (tmp_path / "tokenizer.json").write_bytes((two_towers / "tokenizer.json").read_bytes())
    text = dataclasses.replace(predictor.model.text, tokenizer="tokenizer.json", pad_id=1)
    model = dataclasses.replace(predictor.model, text=text)
    other = inference.Predictor(model, predictor.params, folder=tmp_path)
    module = grain.GRAIN(model)
    (expected,) = jax.jit(module.apply, static_argnames="method")(
        {"params": other.params},
        np.array([[[9, 3, 2]]]),
        np.array([[[0, 1, 2]]]),
        np.ones((1, 1, 3), int),
        np.array([[0, 2]]),
        method=grain.GRAIN.encode_text,
    )
    close(other.encode_text(["beak photo a"]), expected)
    with pytest.raises(inference.InputError, match="the end of a text has not the highest id"):
        other.tokenizer("beak photo a")


def test_two_towers_have_no_regions(two_towers, pictures):
    loaded, one = grain_jax.load(str(two_towers)), pictures[:1]
    for what, call in {
        "regions": lambda: loaded.encode_image_and_regions(one),
        "ground": lambda: loaded.ground(pictures[0], ["wren"]),
        "alpha 0.5": lambda: loaded.classify(one, {"a": ["b"]}, alpha=0.5),
        "alpha 0.25": lambda: loaded.classify(one, ["a"], alpha=0.25),
    }.items():
        said = rf"^{what}: the model has two towers and [^\n]*\Z"
        with pytest.raises(inference.InputError, match=said):
            call()


zeros = lambda *shape, dtype=np.uint8: np.zeros(shape, dtype)
classify = lambda *given: lambda p: p.classify(jnp.zeros((1, S, S, 3)), *given)
ERRORS = {
    r"float32 of 8 x 8 pixels, expected 16 x 16": zeros(2, 8, 8, 3, dtype=np.float32),
    r"got shape \[8, 8\], expected": zeros(8, 8),
    r"uint8 \[8, 8, 4\]": zeros(8, 8, 4),
    r"images\[0\]: got float32": [zeros(8, 8, 3, dtype=np.float32)],
    r"got int64, expected uint8": zeros(1, 8, 8, 3, dtype=np.int64),
    r"images\[0\]: got str": ["x.jpg"],
    r"got str, expected images": "x.jpg",
    r"got NoneType, expected images": None,
    r"images\[1\]: mode F has no fixed range": [PIL.Image.new(m, (4, 4)) for m in "LF"],
    r"images\[0\]: .*truncated": [cut_off()],
    r"images\[0\]: got an array uint8 \[4, 4, 4\]": [zeros(4, 4, 4)],
    r"has no box head": lambda p: p.encode_tokens(PIL.Image.new("RGB", (4, 4))),
    r"dtype: got 'float16', expected float32 or bfloat16": (
        lambda p: inference.Predictor(p.model, p.params, "float16")
    ),
    r"expected strings or int32": lambda p: p.encode_text(["wren", 3]),
    r"got int32 \[2, 33\]": lambda p: p.encode_text(np.zeros((2, 33), np.int32)),
    r"token ids 49408 to 49408, expected 0 to 49407": (
        lambda p: p.encode_text(np.full((2, 3), 49408))
    ),
    r"alpha 0.5 needs descriptions": classify(["wren"], 0.5),
    r"'wren' has no description": classify({"wren": []}),
    r"at 'wren', expected": classify({"wren": "tail"}),
    r"expected names": classify([]),
    r"alpha: got 1.5": classify(["wren"], 1.5),
    r"expected \[H, W, 3\]": lambda p: p.ground(np.zeros((1, S, S, 3)), ["x"]),
}


@pytest.mark.parametrize("said", ERRORS)
def test_errors_are_one_line(predictor, said):
    given = ERRORS[said]
    with pytest.raises(ValueError, match=said) as error:
        given(predictor) if callable(given) else predictor.encode_image(given)
    assert "\n" not in str(error.value)
