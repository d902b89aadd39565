"""What the heads of the decoder give."""

import jax
import numpy as np
import pytest

from grain_jax.core import boxes as boxes_lib
from grain_jax.models.grain import GRAIN
from tests import perturbed, tiny


def test_the_image_embedding_is_the_sum_of_all_queries():
    alone, of_all = (tiny.config(model__decoder__image_pool=pool) for pool in ("query", "all"))
    image = tiny.batch(alone).image
    encode = dict(method=lambda module, image: module.embeddings(module.image_tokens(image))[:3])
    params = jax.jit(lambda: GRAIN(alone.model).init(jax.random.key(0), image, **encode))()
    apply = lambda c: jax.jit(lambda p: GRAIN(c.model).apply(p, image, **encode))(params)
    (image_embed, region_embed, _), (of_queries, regions, _) = map(apply, (alone, of_all))
    total = np.float64(image_embed) + np.float64(region_embed).sum(axis=1)
    expected = total / np.linalg.norm(total, axis=-1, keepdims=True)
    np.testing.assert_allclose(of_queries, expected, atol=1e-6)
    np.testing.assert_array_equal(regions, region_embed)


def pointer_in_float64(params, hidden, patches, centres):
    """docs/method.md, Pointer, patch by patch: boxes [T, B, Q, 4] of queries and [B, P, 5] of patches."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    dense = lambda x, name: x @ p[name]["kernel"] + p[name].get("bias", 0)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    of_patches = dense(np.maximum(dense(patches, "layer_0"), 0), "layer_1")
    start = np.concatenate([centres, np.full_like(centres, 0.38)], axis=-1)
    boxes = sigmoid(of_patches[..., :4] + np.log(start / (1 - start)))
    query, key = dense(hidden, "query"), dense(patches, "key")
    out = np.zeros((*hidden.shape[:3], 4))
    for t, b, q in np.ndindex(hidden.shape[:3]):
        logit = 6 * key[b] @ query[t, b, q] / np.sqrt(key.shape[-1]) + of_patches[b, :, 4]
        weight = np.exp(logit - logit.max())
        out[t, b, q] = weight @ boxes[b] / weight.sum()
    return out, np.concatenate([boxes, of_patches[..., 4:]], axis=-1)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_queries_point_at_patches_and_read_their_box(keep):
    model = perturbed.tiny(**perturbed.POINTER, decoder__image_pool="all", image__depth=1)
    params, module = perturbed.params(model), GRAIN(model)
    image = np.random.default_rng(0).standard_normal((2, 40, 40, 3)).astype(np.float32)
    kept = None if keep == 1 else np.array([np.arange(0, 24, 2), np.arange(1, 25, 2)])

    def everything(module):
        tokens = module.image_tokens(image, kept)
        boxes = module.embeddings(tokens, kept=kept)[2][:, -1]
        corners = boxes_lib.cxcywh_to_xyxy(boxes)
        read = module._read_boxes(tokens, corners, kept)
        hidden = module.decoder(tokens)[:, :, :3]
        own = module.region_projection(hidden[-1])
        return tokens, hidden, own, read, module.embeddings(tokens, kept=kept)

    run = jax.jit(lambda p: module.apply({"params": p}, method=everything))
    tokens, hidden, own, read, (image_embed, region_embed, boxes, of_tokens) = run(params)
    y, x = np.divmod(np.arange(25) if kept is None else kept, 5)
    centres = np.broadcast_to((np.stack([x, y], axis=-1) + 0.5) / 5, (2, *x.shape[-1:], 2))
    pointer = params["pointer"]
    expected = pointer_in_float64(pointer, *map(np.float64, (hidden, tokens[:, 1:])), centres)
    np.testing.assert_allclose(boxes.swapaxes(0, 1), expected[0], atol=2e-6)
    np.testing.assert_allclose(of_tokens.boxes_cxcywh, expected[1][..., :4], atol=2e-6)
    np.testing.assert_allclose(of_tokens.logit, expected[1][..., 4], atol=2e-5)
    np.testing.assert_allclose(of_tokens.centre_xy, centres, atol=1e-7)
    both = np.float64(own) + np.float64(read)
    both /= np.linalg.norm(both, axis=-1, keepdims=True)
    np.testing.assert_allclose(region_embed, both, atol=2e-6)
    assert np.abs(read).mean() > 0.1 * np.abs(own).mean() > 0


def test_no_gradient_moves_boxes_to_what_reads_them():
    """L_box alone moves them: an embedding's gradient leaves the pointer's parameters as they are."""
    model = perturbed.tiny(**perturbed.POINTER, image__depth=1, decoder__depth=1)
    image = np.random.default_rng(0).standard_normal((2, 40, 40, 3)).astype(np.float32)

    def total(params):
        embed = lambda module: module.embeddings(module.image_tokens(image))[1]
        return GRAIN(model).apply({"params": params}, method=embed).sum()

    grads = jax.jit(jax.grad(total))(perturbed.params(model))
    assert not any(np.any(x) for x in jax.tree.leaves(grads["pointer"]))
    assert np.any(grads["box_projection"]["kernel"])
