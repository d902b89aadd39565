"""What the heads give: the decoder's, the pointer, and the box head, whose RoIAlign is torchvision's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision

from grain_jax.core import boxes as boxes_lib
from grain_jax.models import box_head, grain
from tests import perturbed, tiny

pytestmark = pytest.mark.long


def _boxes(rng):
    """Any boxes, of which some lie over the edge or outside, and one is a point: float32 xyxy [2, 40, 4]."""
    ends = rng.uniform(-0.4, 1.4, (2, 2, 40, 2))
    boxes = np.concatenate([ends.min(0), ends.max(0)], axis=-1).astype(np.float32)
    boxes[0, :5] = [
        [0, 0, 1, 1],
        [0.3, 0.4, 0.3, 0.4],
        [1, 1, 1.2, 1.3],
        [-2, -2, -1.5, -1],
        [0.5, 0, 1, 0.1],
    ]
    return boxes


@pytest.mark.parametrize("bins,samples", [(1, 4), (3, 2), (7, 2)])
def test_roi_align_equals_that_of_torchvision(bins, samples):
    rng = np.random.default_rng(bins)
    features, boxes = rng.normal(size=(2, 5, 7, 3)).astype(np.float32), _boxes(rng)
    theirs = torch.tensor(features.transpose(0, 3, 1, 2)).requires_grad_()
    in_cells = list(torch.tensor(boxes * np.array([7, 5, 7, 5], np.float32)))
    expected = torchvision.ops.roi_align(theirs, in_cells, bins, 1.0, samples, aligned=True)
    cotangent = rng.normal(size=expected.shape).astype(np.float32)
    expected.backward(torch.tensor(cotangent))

    def back(x):  # torchvision: [2 * 40, 3, bins, bins]
        return x.reshape(2, 40, 3, bins, bins).transpose(0, 1, 3, 4, 2)

    got, pull = jax.vjp(
        lambda x: box_head.roi_align(x, jnp.asarray(boxes), bins=bins, samples=samples), features
    )
    np.testing.assert_allclose(got, back(expected.detach().numpy()), atol=1e-5)
    (gradient,) = pull(back(cotangent))
    expected = theirs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_places_of_tokens():
    token_boxes = box_head.token_boxes(10, 1)
    assert token_boxes.shape == (10, 4)
    np.testing.assert_allclose(token_boxes[0], [0, 0, 1, 1])
    np.testing.assert_allclose(token_boxes[6], [2 / 3, 1 / 3, 1, 2 / 3])  # second row, last column
    with pytest.raises(ValueError, match="got 9 tokens, 1 of them leading, expected a square"):
        box_head.token_boxes(9, 1)


def test_a_box_has_an_embedding_of_its_own_and_leaves_the_rest_of_the_model_alone():
    c = tiny.small(model__boxes__kind="roi_align", loss__box_description=1.0)
    module, batch = grain.GRAIN(c.model, "float32"), tiny.batch(c)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]
    shapes = {name: x.shape for name, x in grain.flat(nn.unbox(shapes)).items()}
    assert grain.parameter_shapes(c.model) == shapes  # which has no boxes
    params = perturbed.params(c.model)
    plain = grain.GRAIN(tiny.small().model, "float32")
    kept = {k: v for k, v in params.items() if k not in ("box_head", "box_projection")}
    corners = boxes_lib.cxcywh_to_xyxy(batch.region_boxes_cxcywh)

    @jax.jit
    def run(params):
        tokens = module.apply(params, batch.image, method="image_tokens")
        encode = lambda boxes: module.apply(params, tokens, boxes, method="box_embeddings")
        without = plain.apply({"params": kept}, batch)
        return module.apply(params, batch), without, encode(corners), encode(corners[:, 3:4])

    out, without, asked, alone = run({"params": params})
    np.testing.assert_allclose(out.box_embed, asked, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=-1), 1, rtol=1e-5)
    assert np.abs(asked[:, 0] - asked[:, 1]).max(-1).min() > 1e-3  # other boxes, other embeddings
    np.testing.assert_allclose(alone, asked[:, 3:4], atol=1e-6)
    assert without.box_embed is None
    for name in ("image_embed", "text_embed", "region_embed", "region_text_embed"):
        np.testing.assert_allclose(getattr(out, name), getattr(without, name), atol=1e-6)


def test_boxes_and_queries_of_an_image_of_another_size():
    """They read its 9 patches, not the 25 of the config."""
    model = perturbed.tiny(boxes__kind="roi_align", image__depth=1, decoder__depth=1)
    params, module = perturbed.params(model), grain.GRAIN(model)
    images = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
    boxes = np.array([[[0.1, 0.2, 0.7, 0.8], [0, 0, 1, 1]]] * 2, np.float32)

    def all_of(module):
        tokens = module.image_tokens(images)
        return tokens, module.embeddings(tokens), module.box_embeddings(tokens, boxes)

    run = jax.jit(lambda params: module.apply({"params": params}, method=all_of))
    tokens, (image_embed, regions, *_), box_embed = run(params)
    assert tokens.shape == (2, 10, 48)
    assert image_embed.shape == (2, 28) and regions.shape == (2, 3, 28)
    np.testing.assert_allclose(np.linalg.norm(box_embed, axis=-1), np.ones((2, 2)), atol=1e-5)
    head = model.boxes
    features = torch.tensor(np.asarray(tokens[:, 1:])).reshape(2, 3, 3, 48).permute(0, 3, 1, 2)
    aligned = torchvision.ops.roi_align(
        features, list(torch.tensor(boxes * 3)), head.bins, 1.0, head.samples, aligned=True
    )
    rows = aligned.permute(0, 2, 3, 1).reshape(2, 2, -1).numpy()
    expected = rows @ np.asarray(grain.flat(params)["box_projection/kernel"])
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(box_embed, expected, atol=1e-5)


def test_the_image_embedding_is_the_sum_of_all_queries():
    alone, of_all = (tiny.config(model__decoder__image_pool=pool) for pool in ("query", "all"))
    image = tiny.batch(alone).image
    encode = dict(method=lambda module, image: module.embeddings(module.image_tokens(image))[:3])
    params = jax.jit(lambda: grain.GRAIN(alone.model).init(jax.random.key(0), image, **encode))()
    apply = lambda c: jax.jit(lambda p: grain.GRAIN(c.model).apply(p, image, **encode))(params)
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
    params, module = perturbed.params(model), grain.GRAIN(model)
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
        return grain.GRAIN(model).apply({"params": params}, method=embed).sum()

    grads = jax.jit(jax.grad(total))(perturbed.params(model))
    assert not any(np.any(x) for x in jax.tree.leaves(grads["pointer"]))
    assert np.any(grads["box_projection"]["kernel"])
