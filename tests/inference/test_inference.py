import contextlib
import copy
import dataclasses
import io
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import grain_jax
from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.checkpoint import files, saved_model
from grain_jax.core import images, progress, schema
from grain_jax.inference import batches, jitted, prompts, scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain
from tests import perturbed, tiny

S, Q, D = 16, 5, 16
PICTURES = np.random.default_rng(0).integers(0, 256, (70, S, S, 3)).astype(np.uint8)
FEW, ONE = PICTURES[:3], PIL.Image.fromarray(PICTURES[0])
CLASSES = {"wren": ["a short tail", "brown wings"], "red kite": ["has a forked tail"]}


def normalised(image):
    """uint8 [..., 3] by ImageNet's mean and std, float32."""
    return (image.astype(np.float32) / 255.0 - schema.IMAGE_MEAN) / schema.IMAGE_STD


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
    saved_model.save_model(folder, c.model, perturbed.params(c.model), source="test")
    perturbed.write_words(folder, "<unk> </s> a photo of wren with long orange beak")
    return folder


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def applied(predictor, method, *arguments):
    """What the module itself returns."""
    apply = jax.jit(grain.GRAIN(predictor.model).apply, static_argnames="method")
    return apply({"params": predictor.params}, *arguments, method=method)


def test_all_kinds_of_pictures_agree(predictor, tmp_path):
    expected = predictor.encode_image(FEW)
    assert expected.dtype == np.float32 and expected.shape == (3, D)
    close(np.linalg.norm(expected, axis=1), 1)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    pils = [PIL.Image.fromarray(p) for p in FEW]
    for i, image in enumerate(pils):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png"), pils[2]]
    for same in (pils, list(FEW), FEW / np.float32(255), paths):
        close(predictor.encode_image(same), expected)
    close(predictor.encode_image(paths[0]), expected[0])
    close(predictor.encode_image(normalised(FEW), normalized=True), expected)
    large = np.random.default_rng(1).integers(0, 256, (3, 40, 25, 3)).astype(np.uint8)
    resized = np.stack([images.resize(PIL.Image.fromarray(p), S) for p in large])
    close(predictor.encode_image(large), predictor.encode_image(resized))
    ready = predictor.preprocess(pils[1])
    assert ready.dtype == np.float32 and ready.shape == (S, S, 3)
    close(ready, normalised(FEW[1]))
    close(predictor.encode_image([ready, ready], normalized=True), expected[[1, 1]])


@pytest.mark.parametrize(
    "call, shapes",
    [
        (lambda p, x: p.encode_image(x), [(D,)]),
        (lambda p, x: p.encode_regions(x), [(Q, 4), (Q, D), (Q,)]),
        (lambda p, x: p.encode_image_and_regions(x), [(D,), (Q, 4), (Q, D), (Q,)]),
        (lambda p, x: p.classify(x, CLASSES, 0.5), [(2,)]),
    ],
    ids=["image", "regions", "both", "classify"],
)
def test_one_image_gives_what_belongs_to_it(predictor, call, shapes):
    expected = [leaf[0] for leaf in jax.tree.leaves(call(predictor, PICTURES[:1]))]
    for single in (ONE, PICTURES[0], PICTURES[0] / np.float32(255)):
        got = jax.tree.leaves(call(predictor, single))
        assert [x.shape for x in got] == shapes
        for a, b in zip(got, expected):
            close(a, b)


def test_one_text_gives_what_belongs_to_it(predictor):
    embed = predictor.encode_text(["a wren"])
    ids = predictor.tokenizer("a wren")
    assert ids.dtype == np.int32 and ids.shape == (32,)
    for single in ("a wren", ids):
        close(predictor.encode_text(single), embed[0])
    texts = ["a wren", "wren " * 40]
    expected = tokenizer.ClipTokenizer()(texts, 32)
    np.testing.assert_array_equal(predictor.tokenizer(t for t in texts), expected)
    single, (same,) = (predictor.ground(PICTURES[0], x) for x in ("a wren", ["a wren"]))
    assert single.score == same.score and single.box_xyxy.shape == (4,)
    assert predictor.similarity_map(PICTURES[0], "a wren").ndim == 2


def test_the_size_of_a_call_does_not_matter(predictor, capsys):
    image, regions = predictor.encode_image_and_regions(PICTURES)
    assert image.shape == (70, D)
    assert regions.embed.shape == (70, Q, D) and regions.boxes_xyxy.shape == (70, Q, 4)
    for part_of in (slice(0, 1), slice(67, 70)):
        close(predictor.encode_image(PICTURES[part_of]), image[part_of])
        part = predictor.encode_regions(PICTURES[part_of])
        close(part.embed, regions.embed[part_of])
        close(part.boxes_xyxy, regions.boxes_xyxy[part_of])
    assert predictor.encode_image([]).shape == predictor.encode_text([]).shape == (0, D)
    assert capsys.readouterr().err == ""  # progress is shown where it is asked for
    shown = inference.Predictor(predictor.model, predictor.params, progress=True)
    shown.encode_image(PICTURES)
    assert f"images: {len(PICTURES)}/{len(PICTURES)}, " in capsys.readouterr().err


def test_a_large_call_is_shared_out_among_the_devices(predictor):
    used = []

    def program(params, image):
        used.append((params["logit_scale"].sharding.device_set, image.sharding, image.shape))
        return image

    many = np.concatenate([PICTURES] * 4)[:200]
    np.testing.assert_array_equal(predictor._runner.run(program, many), many)
    (devices, sharding, shape) = used[0]
    assert devices == set(jax.devices()) and len(devices) == 8
    assert shape[0] == 8 * 8 and sharding.shard_shape(shape)[0] == 8 and len(used) == 4
    texts = [f"a wren with {n} eggs" for n in range(100)]
    close(predictor.encode_text(texts)[98:], predictor.encode_text(texts[98:]))


def test_pictures_and_texts_from_a_generator(predictor, monkeypatch):
    taken, seen = [], []

    def one_by_one():
        for i, picture in enumerate(PICTURES):
            taken.append(i)
            yield PIL.Image.fromarray(picture) if i % 2 else picture

    with monkeypatch.context() as patch:
        patch.setattr("grain_jax.inference.batches.MAX_BATCH", 4)
        first_pixel = lambda program, rows: seen.append(len(taken)) or (rows[:, 0, 0],) * 3
        patch.setattr(predictor._runner, "run", first_pixel)
        np.testing.assert_array_equal(predictor.encode_image(one_by_one()), PICTURES[:, 0, 0])
    assert seen == [32, 64, 70]  # no more are held than run at once: 4 on each of 8 devices
    expected = predictor.classify(FEW, list(CLASSES))
    close(predictor.classify((p for p in FEW), (name for name in CLASSES)), expected)


def test_regions_are_the_models_last_layer(predictor):
    few = normalised(FEW)
    image, region, boxes, _ = applied(predictor, "embeddings", applied(predictor, "image_tokens", few))
    regions = predictor.encode_regions(few, normalized=True)
    close(regions.embed, region)
    close(predictor.encode_image(few, normalized=True), image)
    centre, half = np.asarray(boxes[:, -1, :, :2]), np.asarray(boxes[:, -1, :, 2:]) / 2
    close(regions.boxes_xyxy, np.concatenate([centre - half, centre + half], axis=-1).clip(0, 1))


def test_texts_keep_their_order_whatever_their_length(predictor):
    texts = [" ".join(["wren"] * n) for n in (40, 1, 18)] + ["a photo of a wren"]
    embed = predictor.encode_text(texts)
    assert embed.shape == (4, D) and embed.dtype == np.float32
    close(np.linalg.norm(embed, axis=1), 1)
    tokens = tokenizer.ClipTokenizer()(texts, 32)
    close(predictor.encode_text(tokens), embed)
    positions = np.arange(32)[None, None]
    for row, measured in zip(tokens, embed):
        index = np.array([[0, row.argmax()]])
        arguments = row[None, None], positions, np.ones_like(positions), index
        (alone,) = applied(predictor, grain.GRAIN.encode_text, *arguments)
        close(measured, alone[0])
    assert np.abs(embed[1] - embed[3]).max() > 0.01


def test_classify_names_and_descriptions(predictor):
    image, regions = predictor.encode_image_and_regions(FEW)
    for described in (False, True):
        means = []
        for name, its_own in CLASSES.items():
            texts = prompts.class_texts(name, predictor.templates, its_own if described else None)
            means.append(predictor.encode_text(texts).mean(axis=0))
        expected = image @ np.stack(means).T
        got = predictor.classify(FEW, CLASSES if described else list(CLASSES))
        assert got.shape == (3, 2) and got.dtype == np.float32
        close(got, expected)
    cosines = [regions.embed @ predictor.encode_text(each).T for each in CLASSES.values()]
    region = np.stack([x.max(axis=2).mean(axis=1) for x in cosines], axis=1)
    close(predictor.classify(FEW, CLASSES, alpha=0.25), 0.25 * expected + 0.75 * region)
    close(predictor.classify(FEW, predictor.class_features(CLASSES), alpha=0.0), region)
    assert np.abs(scores.unit(means) - np.stack(means)).max() > 1e-3  # the mean is not renormalised


def test_parameters_stay_where_they_are_and_programs_are_shared(predictor):
    # A run on GPUs may have asked for cuDNN; its model is read on a machine that has none.
    trained = dataclasses.replace(predictor.model, attention="cudnn")
    other = inference.Predictor(trained, predictor.params)
    assert other.model == predictor.model
    for mine, theirs in zip(jax.tree.leaves(other.params), jax.tree.leaves(predictor.params)):
        assert mine is theirs
    expected = predictor.encode_image(FEW)
    program = jitted.image_program(predictor.model, "float32")
    programs = program._cache_size()
    doubled = inference.Predictor(predictor.model, jax.tree.map(lambda x: 2 * x, predictor.params))
    close(other.encode_image(FEW), expected)
    assert np.abs(doubled.encode_image(PICTURES[:4])[:3] - expected).max() > 1e-3
    assert program._cache_size() == programs


def test_the_first_call_says_what_it_compiles(predictor, monkeypatch):
    """Where that takes long: tests/core/test_progress.py."""
    lines = []

    def while_compiling(label, usually, *, silent, once):
        lines.append((label, silent, once))
        return contextlib.nullcontext()

    monkeypatch.setattr(progress, "while_compiling", while_compiling)
    predictor.classify(FEW, ["wren", "kite"])
    assert set(lines) == {("the model for this machine", False, True)}


def test_batches_have_few_sizes():
    expected = {3: [1, 1, 1], 5: [8], 70: [64, 8], 33: [64], 32: [8] * 4}
    assert {count: batches._sizes(count, (64, 8, 1)) for count in expected} == expected
    assert batches._sizes(1, (8,)) == [8] and batches._sizes(65, (64, 8)) == [64, 8]


def test_few_programs_serve_the_first_calls(predictor):
    """README's example: one program of images, one of texts, and one more for `ground` with a box head."""
    c = tiny.config(model__embed_dim=D, model__boxes__kind="roi_align", loss__box_description=1.0)
    fresh = inference.Predictor(c.model, perturbed.params(c.model))
    programs = []
    listen = lambda name, _, **more: programs.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    fresh.classify(list(FEW), CLASSES, alpha=0)
    assert len(programs) == 2
    fresh.ground(ONE, "a tail")
    assert len(programs) == 3
    fresh.detect(list(FEW), ["a tail", "a beak"])
    assert len(programs) == 3
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_copy_has_the_weights_and_the_settings(predictor, tmp_path):
    saved_model.save_model(tmp_path / "model", predictor.model, predictor.params, source="test")
    loaded = grain_jax.load(str(tmp_path / "model"), templates=predictor.templates)
    for same in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor)), loaded):
        assert same.templates == predictor.templates and same.model == predictor.model
        np.testing.assert_array_equal(same.encode_image(FEW), predictor.encode_image(FEW))
    with pytest.raises(files.CheckpointError, match="no such folder"):
        grain_jax.load(str(tmp_path / "none"))
    moved = inference.Predictor(predictor.model, predictor.params, device=jax.devices()[3])
    assert moved.params["logit_scale"].devices() == {jax.devices()[3]}
    close(moved.encode_image(PICTURES), predictor.encode_image(PICTURES))


def test_two_towers_that_see_their_padding(two_towers):
    loaded = grain_jax.load(str(two_towers))
    assert loaded.model.decoder is None and not loaded.model.text.packable
    normalised = (FEW / 255 - np.array((0.5, 0.4, 0.3))) / np.array((0.5, 0.6, 0.7))
    normalised = normalised.astype(np.float32)
    image, *_ = applied(loaded, "embeddings", applied(loaded, "image_tokens", normalised))
    assert np.abs(image[0] - image[1]).max() > 0.01
    close(loaded.encode_image(FEW), image)
    close(loaded.encode_image(normalised, normalized=True), image)

    texts = ["A long, orange beak!", "wren", " ".join(["photo"] * 40)]
    ids = np.full((3, 32), 1, np.int32)  # padded with model.text.pad_id to the whole context
    ids[0, :4], ids[1, 0], ids[2] = (2, 7, 8, 9), 5, 3
    positions = np.broadcast_to(np.arange(32), (1, 3, 32))
    index = np.stack([np.arange(3), np.zeros(3, np.int64)], axis=1)
    arguments = ids[None], positions, np.ones_like(positions), index
    expected = np.asarray(applied(loaded, grain.GRAIN.encode_text, *arguments)[0])
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    for same in (texts, ids, loaded.tokenizer(texts)):
        close(loaded.encode_text(same), expected)
    close(loaded.encode_text(np.concatenate([ids[:2, :6]] * 2)[:3]), expected[[0, 1, 0]])
    assert loaded.encode_text([]).shape == (0, D) and loaded.encode_image([]).shape == (0, D)
    classes = inference.ClassFeatures(("beak", "wren"), expected[:2], None)
    close(loaded.classify(FEW, classes), image @ expected[:2].T)


def test_texts_of_a_tokenizer_file_end_at_their_last_token(tmp_path, two_towers, predictor):
    # The end token need not be the highest id, as it is in CLIP.
    (tmp_path / "tokenizer.json").write_bytes((two_towers / "tokenizer.json").read_bytes())
    text = dataclasses.replace(predictor.model.text, tokenizer="tokenizer.json", pad_id=1)
    model = dataclasses.replace(predictor.model, text=text)
    other = inference.Predictor(model, predictor.params, folder=tmp_path)
    arguments = np.array([[[9, 3, 2]]]), np.array([[[0, 1, 2]]]), np.ones((1, 1, 3), int)
    (expected,) = applied(other, grain.GRAIN.encode_text, *arguments, np.array([[0, 2]]))
    close(other.encode_text(["beak photo a"]), expected)
    with pytest.raises(inference.InputError, match="do not end with the highest id"):
        other.tokenizer("beak photo a")


def test_models_without_regions_say_so(two_towers):
    c = tiny.config(model__embed_dim=D, model__decoder__queries=0, input__max_regions=0)
    none, loaded = (inference.Predictor(c.model, perturbed.params(c.model)), grain_jax.load(str(two_towers)))
    for begin, call in {
        "ground: .*model.decoder.queries is 0": lambda: none.ground(ONE, ["wren"]),
        "alpha 0.5: .*model.decoder.queries": lambda: none.classify(ONE, {"a": ["b"]}, 0.5),
        "regions: .*model.decoder is null": lambda: loaded.encode_image_and_regions(ONE),
    }.items():
        with pytest.raises(inference.InputError, match=rf"^{begin}[^\n]*\Z"):
            call()


def cut_off():
    """An image whose file ends too early, which PIL notices when its pixels are read."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    PIL.Image.fromarray(noise).save(file, "JPEG")
    return PIL.Image.open(io.BytesIO(file.getvalue()[:-500]))


zeros = lambda *shape, dtype=np.uint8: np.zeros(shape, dtype)
classify = lambda *arguments: lambda p: p.classify(jnp.zeros((1, S, S, 3)), *arguments)
ERRORS = {
    r"got float32 \[8, 8, 3\] from 2 to 2, .* normalized=True": [zeros(8, 8, 3, dtype=np.float32) + 2],
    r"expected float32 \[B, 16, 16, 3\] with normalized": lambda p: p.encode_image(
        zeros(2, 8, 8, 3, dtype=np.float32), normalized=True
    ),
    r"images\[0\]: got int, expected a path, a PIL image, or uint8": [3],
    r"images\[0\]: none.png: No such file": ["none.png"],
    r"device: got 'abacus', expected one of cpu:0": lambda p: inference.Predictor(
        p.model, p.params, device="abacus"
    ),
    r"images\[1\]: mode F has no fixed range": [PIL.Image.new(m, (4, 4)) for m in "LF"],
    r"images\[1\]: mode I has no fixed range": [PIL.Image.new(m, (4, 4)) for m in "LI"],
    r"images\[0\]: .*truncated": [cut_off()],
    r"expected strings or int32": lambda p: p.encode_text(["wren", 3]),
    r"got int32 \[2, 33\]": lambda p: p.encode_text(np.zeros((2, 33), np.int32)),
    r"token ids 49408 to 49408, expected 0 to 49407": lambda p: p.encode_text(np.full((2, 3), 49408)),
    r"'wren' has no description": classify({"wren": []}),
    r"alpha: got 1.5": classify(["wren"], 1.5),
}


@pytest.mark.parametrize("said", ERRORS)
def test_errors_are_one_line(predictor, said):
    arguments = ERRORS[said]
    with pytest.raises(ValueError, match=said) as error:
        arguments(predictor) if callable(arguments) else predictor.encode_image(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype, expected", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_are_of_full_precision_in_float32(predictor, dtype, expected):
    """CPUs compute both alike; TPUs and GPUs round the operands unless told not to."""
    encode = jitted.image_program(predictor.model, dtype)
    text = encode.lower(predictor.params, FEW).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > 10 and all(expected in product for product in products)
