"""The text decoder against torch in float64; packed rows against sequences alone; the cache against whole sequences."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax import config as config_lib
from grain_jax.losses import boxes as boxes_lib
from grain_jax.models import text_decoder
from grain_jax.models.text_decoder import Sequences, Text, Vocabulary

SIZES = config_lib.TextDecoder(
    width=24, depth=2, heads=3, mlp_dim=40, bins=10, row_length=40, activation="gelu_tanh"
)
WORDS = Vocabulary(texts=50, bins=10)
IMAGES, PATCHES, OF_IMAGE = 3, 9, 20


def texts(rng, sequences, most=6, whole=True) -> Text:
    """Random texts of 1 to `most` words; the last one of the first image is not there."""
    real = np.ones((IMAGES, sequences), bool)
    real[0, -1] = False
    return Text(
        jnp.asarray(rng.integers(0, WORDS.texts, (IMAGES, sequences, most)), jnp.int32),
        jnp.asarray(rng.integers(1, most + 1, (IMAGES, sequences)), jnp.int32),
        jnp.full((IMAGES, sequences), whole),
        jnp.asarray(real),
    )


def boxes(rng, sequences):
    corners = np.sort(rng.uniform(size=(IMAGES, sequences, 2, 2)), axis=2)
    return jnp.asarray(corners.reshape(IMAGES, sequences, 4), jnp.float32)


@functools.cache
def case():
    """(the decoder, its parameters, patches, rows)."""
    rng = np.random.default_rng(0)
    module = text_decoder.TextDecoder(SIZES, WORDS, np.dtype("float32"), "xla")
    of_regions, of_boxes = texts(rng, 2), boxes(rng, 2)
    rows = text_decoder.pack(
        [
            text_decoder.caption(WORDS, texts(rng, 1)),
            text_decoder.describe(WORDS, of_boxes, of_regions),
            text_decoder.point(WORDS, of_regions, of_boxes),
        ],
        40,
    )
    patches = jnp.asarray(rng.normal(size=(IMAGES, PATCHES, OF_IMAGE)), jnp.float32)
    shapes = nn.unbox(
        jax.eval_shape(
            lambda: module.init(jax.random.key(0), patches, rows, method=module.features)["params"]
        )
    )
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
    return module, jax.tree.map(draw, shapes), patches, rows


def features(params, patches, rows):
    module = case()[0]
    return module.apply({"params": params}, patches, rows, method=module.features)


def tensor(x):
    """As a tensor of float64; a tensor stays what it is."""
    return x if isinstance(x, torch.Tensor) else torch.tensor(np.array(x), dtype=torch.float64)


def replica(params, patches, tokens, positions, sees):
    """The logits of one row in float64: tokens and positions [T], sees bool [T, T]."""
    p, patches = jax.tree.map(tensor, (params, patches))
    norm = lambda p, x: torch.nn.functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)

    def attend(p, x, memory, mask=None):
        heads = lambda name, x: (
            torch.einsum("te,ekh->kth", x, p[name]["kernel"]) + p[name]["bias"][:, None]
        )
        found = torch.nn.functional.scaled_dot_product_attention(
            heads("query", x), heads("key", memory), heads("value", memory), mask
        )
        return torch.einsum("kth,khe->te", found, p["out"]["kernel"]) + p["out"]["bias"]

    dense = lambda p, x: x @ p["kernel"] + p["bias"]
    x = p["token_embed"][np.array(tokens)] + p["position_embed"][np.array(positions)]
    for layer in range(SIZES.depth):
        b = jax.tree.map(lambda x, layer=layer: x[layer], p["blocks"])
        y = norm(b["norm_1"], x)
        x = x + attend(b["self_attention"], y, y, torch.tensor(np.asarray(sees)))
        x = x + attend(b["cross_attention"], norm(b["norm_2"], x), patches)
        y = torch.nn.functional.gelu(
            dense(b["mlp"]["in"], norm(b["norm_3"], x)), approximate="tanh"
        )
        x = x + dense(b["mlp"]["out"], y)
    return norm(p["norm"], x) @ p["head"].T


def logits(params, found):
    return found @ params["head"].T


def test_packed_rows_equal_each_sequence_alone_in_float64():
    _, params, patches, rows = case()
    found = logits(params, jax.jit(features)(params, patches, rows))
    compared = 0
    for i in range(IMAGES):
        for segment in range(1, int(rows.segments[i].max()) + 1):
            at = np.flatnonzero(rows.segments[i] == segment)
            if not len(at):
                continue
            causal = np.tril(np.ones((len(at), len(at)), bool))
            expected = replica(params, patches[i], rows.tokens[i, at], np.arange(len(at)), causal)
            np.testing.assert_allclose(found[i, at], expected, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == 3 * 5 - 3  # of the first image a caption and a region are not there


def test_later_tokens_and_other_sequences_change_nothing():
    _, params, patches, rows = case()
    run = jax.jit(features)
    before = run(params, patches, rows)
    place = int(np.flatnonzero(rows.segments[1] == 2)[2])
    changed = rows._replace(tokens=rows.tokens.at[1, place].set((rows.tokens[1, place] + 1) % 50))
    after = run(params, patches, changed)
    differs = np.abs(np.asarray(after - before)).max(-1) > 0
    expected = np.zeros_like(differs)
    expected[1] = (rows.segments[1] == 2) & (np.arange(40) >= place)
    np.testing.assert_array_equal(differs, expected)


@pytest.mark.parametrize("length", [40, 17])
def test_rows_hold_the_sequences_that_fit(length):
    rng = np.random.default_rng(1)
    text, of_boxes = texts(rng, 2), boxes(rng, 2)
    parts = [
        text_decoder.describe(WORDS, of_boxes, text),
        text_decoder.point(WORDS, text, of_boxes),
    ]
    rows = text_decoder.pack(parts, length)
    for i in range(IMAGES):
        used, expected = 0, []
        for part in parts:
            for s in range(2):
                n = int(part.length[i, s])
                fits = 0 < n and used + n <= length
                assert bool(rows.kept[i, len(expected)]) == fits
                expected.append(fits)
                if not fits:
                    continue
                at = slice(used, used + n)
                np.testing.assert_array_equal(rows.tokens[i, at], part.tokens[i, s, :n])
                np.testing.assert_array_equal(rows.positions[i, at], np.arange(n))
                np.testing.assert_array_equal(rows.segments[i, at], len(expected))
                np.testing.assert_array_equal(rows.predicted[i, at], part.predicted[i, s, :n])
                where = np.asarray(part.predicted[i, s, :n])
                np.testing.assert_array_equal(
                    rows.targets[i, at][where], part.targets[i, s, :n][where]
                )
                np.testing.assert_array_equal(rows.task[i, at], part.task)
                used += n
        assert not rows.segments[i, used:].any() and not rows.predicted[i, used:].any()
    assert length == 40 or not rows.kept.all()


def one(sequences: Sequences):
    """[(token, target or None), ...] of the first sequence of the second image."""
    n = int(sequences.length[1, 0])
    rows = (
        x[1, 0, :n].tolist() for x in (sequences.tokens, sequences.targets, sequences.predicted)
    )
    return [(token, target if real else None) for token, target, real in zip(*rows)]


def test_the_sequences_of_each_task():
    text = Text(
        jnp.full((2, 1, 4), 7), jnp.full((2, 1), 2), jnp.ones((2, 1), bool), jnp.ones((2, 1), bool)
    )
    text = text._replace(ids=text.ids.at[..., 1].set(8))
    box = jnp.broadcast_to(jnp.array([0.0, 0.19, 0.95, 1.0]), (2, 1, 4))
    end, first = WORDS.end, WORDS.first_bin
    x0, y0, x1, y1 = first, first + 1, first + 9, first + 9
    start = WORDS.task("caption")
    assert one(text_decoder.caption(WORDS, text)) == [(start, 7), (7, 8), (8, end)]
    start = WORDS.task("describe")
    expected = [(start, None), (x0, None), (y0, None), (x1, None), (y1, 7), (7, 8), (8, end)]
    assert one(text_decoder.describe(WORDS, box, text)) == expected
    start = WORDS.task("point")
    expected = [(start, None), (7, None), (8, None), (end, x0), (x0, y0), (y0, x1), (x1, y1)]
    assert one(text_decoder.point(WORDS, text, box)) == expected
    cut = text._replace(is_whole=jnp.zeros((2, 1), bool))
    assert one(text_decoder.caption(WORDS, cut)) == [(WORDS.task("caption"), 7), (7, 8), (8, None)]
    middle = WORDS.boxes(WORDS.quantise(box))[0, 0]
    np.testing.assert_allclose(middle, [0.05, 0.15, 0.95, 0.95], rtol=1e-6)


def test_the_cache_gives_the_logits_of_the_whole_sequence():
    module, params, patches, _ = case()
    rng = np.random.default_rng(2)
    sequence = text_decoder.caption(
        WORDS, texts(rng, 1, most=12)._replace(count=jnp.full((IMAGES, 1), 12))
    )
    tokens = sequence.tokens[:, 0]
    rows = text_decoder.pack([sequence._replace(length=jnp.full((IMAGES, 1), 13))], 40)
    whole = logits(params, jax.jit(features)(params, patches, rows))
    count = jnp.array([3, 1, 5])  # the first tokens, read at once; those after them are anything
    start = jax.jit(functools.partial(module.apply, method=module.start), static_argnums=4)
    step = jax.jit(functools.partial(module.apply, method=module.step))
    found, state = start({"params": params}, patches, tokens[:, :5], count, 16)
    for _ in range(8):
        expected = whole[jnp.arange(IMAGES), state.count - 1]
        np.testing.assert_allclose(
            found[:, : WORDS.size], expected[:, : WORDS.size], rtol=2e-5, atol=2e-5
        )
        assert np.isneginf(found[:, WORDS.size :]).all()
        found, state = step({"params": params}, state, tokens[jnp.arange(IMAGES), state.count])


def test_texts_of_a_batch_lose_the_tokenizers_special_tokens():
    tokens = jnp.array([[[90, 5, 6, 99, 90, 7, 99, 0], [90, 1, 2, 3, 4, 99, 0, 0]]], jnp.int32)
    positions = jnp.array([[[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0, 0]]], jnp.int32)
    at = jnp.array([[[0, 3], [1, 5]], [[0, 6], [0, 0]]])
    real = jnp.array([[True, True], [True, False]])
    found = text_decoder.text_of_batch(tokens, positions, at, real, SIZES, 3)
    np.testing.assert_array_equal(found.ids, [[[5, 6, 0], [1, 2, 3]], [[7, 0, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(found.count, [[2, 3], [1, 0]])
    np.testing.assert_array_equal(found.is_whole, [[True, False], [True, True]])


def test_a_text_that_fills_its_row_has_no_end():
    """Such are those that the tokenizer cut to the context: nothing tells them from those that have its length."""
    tokens = jnp.array([[[90, 5, 6, 99], [90, 7, 99, 0]]], jnp.int32)
    positions = jnp.array([[[0, 1, 2, 3], [0, 1, 2, 0]]], jnp.int32)
    at = jnp.array([[[0, 3], [1, 2]]])
    found = text_decoder.text_of_batch(tokens, positions, at, jnp.ones((1, 2), bool), SIZES, 3)
    np.testing.assert_array_equal(found.count, [[2, 1]])
    np.testing.assert_array_equal(found.is_whole, [[False, True]])
    predicted = text_decoder.caption(WORDS, found).predicted
    np.testing.assert_array_equal(predicted.sum(-1), [[2, 2]])


@pytest.mark.parametrize("bins", [500, 100_000])
@pytest.mark.parametrize("side", [(500, 375), (640, 480), (1000, 250)])
def test_location_tokens_of_whole_pixels_are_those_of_whole_numbers(side, bins):
    """Of corners as use has them, and of centres and sides as training has them."""
    words = Vocabulary(texts=10, bins=bins)
    size, rng = np.array([*side, *side]), np.random.default_rng(0)
    pixels = np.sort(rng.integers(0, np.array(side) + 1, (4000, 2, 2)), axis=1).reshape(-1, 4)
    expected = words.first_bin + np.minimum(pixels * bins // size, bins - 1)
    corners = pixels / size
    as_given = words.quantise(jnp.asarray(corners, jnp.float32))
    np.testing.assert_array_equal(as_given, expected)
    first, last = corners[:, :2], corners[:, 2:]
    cxcywh = np.concatenate([(first + last) / 2, last - first], axis=1)
    as_drawn = words.quantise(boxes_lib.cxcywh_to_xyxy(jnp.asarray(cxcywh, jnp.float32)))
    np.testing.assert_array_equal(as_drawn, expected)
