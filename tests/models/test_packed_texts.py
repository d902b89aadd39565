"""Text towers that are not causal, several texts per row: each as alone in torch with its padding masked."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from grain_jax import inference
from grain_jax.convert import formats, tables
from grain_jax.input_pipeline import packing
from grain_jax.models import grain
from tests import perturbed

LENGTHS = np.array([[9, 4, 16, 5], [12, 3, 2, 7]])  # of the texts of two images
SIZES = dict(text__depth=1, text__causal=False, text__activation="gelu_tanh", text__projection="affine")


@functools.cache
def texts():
    """Ids of all texts, one after another; the highest ends each."""
    ids = np.random.default_rng(1).integers(1, 299, LENGTHS.sum(), dtype=np.int32)
    ids[np.cumsum(LENGTHS) - 1] = 299
    return ids


def rows(length, packed):
    """(tokens, positions, segments, at) of the texts, captions [2, 4]."""
    none = np.zeros((2, 0), np.int32)
    lengths = packing.TextArrays(LENGTHS, none, none[..., None])
    if packed:
        places = packing.pack(lengths, none, pack_group=2, rows=3, row_length=length)
    else:
        places = packing.one_text_per_row(lengths, row_length=length)
    return *packing.fill(places, texts(), lengths), places.ends.captions


def embeddings(module, params, layout):
    """Those of the texts before unit length, [8, D]; of two kinds, as captions and descriptions are."""
    *layout, end_at = layout
    kinds = end_at[:, :1], end_at[:, 1:]
    features = module.apply({"params": params}, *layout, *kinds, method="text_features")
    return jax.numpy.concatenate(features, axis=1).reshape(8, -1)


def with_gradients(module, params, layout, weights):
    """`embeddings`, and the gradients of their sum times `weights`, by flat name."""

    def total(params):
        embed = embeddings(module, params, layout)
        return (embed * weights).sum(), embed

    (_, embed), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    flat = {name: np.asarray(x) for name, x in grain.flat(gradients).items()}
    return np.asarray(embed), {name: x for name, x in flat.items() if name.startswith("text")}


def by_transformers(model, params, pool, weights):
    """As `with_gradients`, in float64: transformers' SigLIP text tower with a mask, each text alone."""
    text, flat = model.text, {n: np.asarray(x) for n, x in grain.flat(params).items()}
    table = formats.hf_text("text_model.head")
    written = tables.write(table, {x.ours: flat[x.ours] for x in table if x.ours in flat})
    state = {n.removeprefix("text_model."): torch.tensor(x) for n, x in written.items()}
    config_of: Any = transformers.SiglipTextConfig
    config = config_of(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=text.mlp_dim,
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        layer_norm_eps=text.norm_eps,
        projection_size=model.embed_dim,
        attn_implementation="eager",
    )
    module: Any = transformers.SiglipTextModel(config).double()
    module.load_state_dict(state)
    tokens, _, segments, _ = rows(text.context_length, packed=False)
    ids, real = (torch.tensor(x.reshape(8, -1)) for x in (tokens, segments > 0))
    hidden = module(ids.long(), attention_mask=real.long()).last_hidden_state
    if pool == "last":
        pooled = hidden[torch.arange(8), real.sum(1) - 1]
    else:
        pooled = torch.stack([x[: int(n)].mean(0) for x, n in zip(hidden, real.sum(1))])
    embed = module.head(pooled)
    (embed * torch.tensor(weights)).sum().backward()
    named = {f"text_model.{n}": x.grad.numpy() for n, x in module.named_parameters()}
    text_of = {n: x.shape for n, x in flat.items() if n.startswith("text")}
    return embed.detach().numpy(), tables.read(table, named, text_of)


@pytest.mark.parametrize("pool", ["last", "mean", "map"])
def test_packed_texts_are_texts_alone_with_masked_padding(pool):
    """Those of a map are compared with ours, a text per row: tests/convert has SigLIP's of whole rows."""
    model = perturbed.tiny(
        **SIZES, text__pool=pool, text__mask_padding=True, decoder=None, image__pool="mean"
    )
    assert model.text.packable
    params, module = perturbed.params(model), grain.GRAIN(model)
    weights = np.random.default_rng(2).normal(size=(8, model.embed_dim))
    layouts = [rows(model.text.context_length, packed) for packed in (True, False)]
    assert [layout[0].shape for layout in layouts] == [(1, 3, 32), (2, 4, 32)]
    results = [with_gradients(module, params, x, weights.astype(np.float32)) for x in layouts]
    if pool != "map":
        results.append(by_transformers(model, params, pool, weights))
    embed, computed = results[0]
    for expected, gradients in results[1:]:
        assert np.abs(embed - expected).max() < 1e-6 * np.abs(expected).max()
        assert computed.keys() == gradients.keys()
        # The bias of the keys has no gradient but rounding.
        floor = 0.01 * max(np.abs(x).max() for x in gradients.values())
        for name, x in gradients.items():
            assert np.abs(computed[name] - x).max() < 1e-5 * max(np.abs(x).max(), floor), name


def test_a_loaded_model_reads_nothing_after_the_end():
    model = perturbed.tiny(**SIZES, text__pool="last", text__mask_padding=True)
    predictor = inference.Predictor(model, perturbed.params(model))
    layout = rows(model.text.context_length, packed=True)
    embed = jax.jit(lambda p: embeddings(grain.GRAIN(model), p, layout))(predictor.params)
    tokens, _, segments, _ = rows(model.text.context_length, packed=False)
    other = np.where(segments > 0, tokens, 7).reshape(8, -1)
    np.testing.assert_allclose(predictor.encode_text(other), grain.normalize(embed), atol=1e-6)
