"""Images in their own shape: masked and padded they are the image alone; grids, positions and boxes by torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision

from grain_jax import config as config_lib
from grain_jax.convert import formats, tables
from grain_jax.core import errors
from grain_jax.core.schema import Patches
from grain_jax.models import box_head, grain, places, rotary, vit
from tests import foreign, perturbed
from tests.models import test_text_decoder as of_decoder
from tests.models.test_rotary import DINOV3, _shapes, _tower
from tests.models.test_towers import dictionary

GRIDS = np.array([(2, 8), (3, 5), (4, 4), (5, 2), (1, 12)], np.int32)  # five ratios
LENGTH, PATCH = 16, 8
FLOAT = jnp.dtype("float32")


def _of_maps(maps):
    """Images [h * p, w * p, 3] each as Patches; what is beyond an image is noise that nothing may see."""
    rng, rows = np.random.default_rng(9), []
    for image in maps:
        own = np.asarray(places.of_pixels(image[None], PATCH))[0]
        noise = rng.normal(size=(LENGTH - len(own), own.shape[1]))
        rows.append(np.concatenate([own, noise]).astype(np.float32))
    grid = [(len(image) // PATCH, image.shape[1] // PATCH) for image in maps]
    return Patches(np.stack(rows), np.array(grid, np.int32))


@functools.cache
def _images():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(h * PATCH, w * PATCH, 3)).astype(np.float32) for h, w in GRIDS]


def _near(found, expected, atol=1e-5):
    """Leaves in parts of the largest value of their array, or of 5% of the largest of all."""
    found, expected = (jax.tree.map(np.asarray, x) for x in (found, expected))
    largest = lambda x: np.abs(x).max(initial=0)
    most = max(map(largest, jax.tree.leaves(expected)))

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(largest(b), 0.05 * most))

    jax.tree.map(compare, found, expected)


def _resized(table, h, w):
    side = round(len(table) ** 0.5)
    square = table.T.reshape(1, -1, side, side)
    resize = functools.partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)
    return resize(square, size=(int(h), int(w)), align_corners=False)[0].flatten(1).T


@pytest.mark.parametrize("side", [3, 7])
def test_positions_are_resized_as_by_torch(side):
    rng = np.random.default_rng(side)
    table = rng.normal(size=(side**2, 6)).astype(np.float32)
    weight = rng.normal(size=(len(GRIDS), LENGTH, 6)).astype(np.float32)
    of = places.of_grid(GRIDS, LENGTH)
    weight *= np.asarray(of.mask)[..., None]
    theirs = torch.tensor(table, requires_grad=True)
    expected = [_resized(theirs, *grid) for grid in GRIDS]
    sum((x * torch.tensor(w[: len(x)])).sum() for x, w in zip(expected, weight)).backward()
    run = jax.jit(lambda table, of: jax.vjp(lambda x: vit.positions_at(x, of), table))
    found, pull = run(table, of)
    for ours, other in zip(found, expected):
        np.testing.assert_allclose(ours[: len(other)], other.detach(), atol=1e-6)
    np.testing.assert_allclose(pull(weight)[0], theirs.grad, atol=1e-5)


def _siglip2():
    """SigLIP 2 of transformers, and its tower here with the parameters."""
    import transformers

    config = transformers.Siglip2VisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_patches=25, patch_size=8, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    module = foreign.perturb(transformers.Siglip2VisionModel(config))
    tower = _tower(image_size=40, class_token=False, activation="gelu_tanh", norm_eps=1e-6)
    own = {f"vision_model.{k}": v.detach().numpy() for k, v in module.named_parameters()}
    params = tables.read(formats.hf_image(flat_patches=True), own, _shapes(tower))
    return module, tower, tables.nested(params)["image"]


def test_siglip2_of_transformers():
    """Its tokens by masks, and those of some patches alone: what its layers make of these embeddings."""
    module, tower, params = _siglip2()
    image = _of_maps(_images())
    mask = np.asarray(places.of_grid(image.grid, LENGTH).mask)
    kept = np.stack([np.random.default_rng(i).permutation(10)[:6] for i in range(5)])
    tensors = torch.tensor(image.pixels), torch.tensor(mask.astype(np.int32))
    with torch.no_grad():
        theirs = module(*tensors, torch.tensor(image.grid)).last_hidden_state.numpy()
        embedded = module.embeddings(tensors[0], torch.tensor(image.grid))
        some = torch.take_along_dim(embedded, torch.tensor(kept)[..., None], 1)
        some = module.post_layernorm(module.encoder(inputs_embeds=some).last_hidden_state).numpy()
    ours = vit.ImageTransformer(tower, FLOAT)
    run = jax.jit(lambda *a: ours.apply({"params": params}, image, **dict(zip(["kept"], a))))
    foreign.close(np.asarray(run())[mask], theirs[mask])
    foreign.close(np.asarray(run(kept.astype(np.int32))), some)


def test_dinov3_of_transformers():
    """Class token, registers and rotary positions, which it normalises by the sides of the image."""
    import transformers

    config = transformers.DINOv3ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=64, num_register_tokens=3, use_gated_mlp=False, hidden_act="gelu",
    )  # fmt: skip
    module = foreign.perturb(transformers.DINOv3ViTModel(config))
    tower = _tower(image_size=32, **DINOV3)
    own = {k: v.detach().numpy() for k, v in module.named_parameters()}
    params = tables.nested(tables.read(formats.hf_dinov3("model."), own, _shapes(tower)))["image"]
    ours = vit.ImageTransformer(tower, FLOAT)
    found = jax.jit(lambda image: ours.apply({"params": params}, image))(_of_maps(_images()))
    for tokens, image in zip(np.asarray(found), _images()):
        with torch.no_grad():
            theirs = module(foreign.torch_images(image[None])).last_hidden_state[0].numpy()
        foreign.close(tokens[: len(theirs)], theirs)


def test_rotary_positions_of_a_square_are_those_of_its_places():
    rope = rotary.Rope("grid", 1e4, trained_grid=4, grid=5, leading=2)
    found = rope.turns(places.of_square(2, 5), 12)
    for ours, table in zip(found, rotary._tables(rope, 12)):
        np.testing.assert_allclose(ours[1], table, atol=2e-6)


MODELS = {
    "queries and RoIAlign": dict(boxes__kind="roi_align", decoder__depth=1),
    "map pool and prompter, by the kernel": dict(
        decoder=None, boxes__kind="prompter", image__pool="map", attention="pallas"
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_image_is_the_image_alone(name):
    """Values and gradients of what the model says of images, boxes and patches, of five ratios."""
    model = perturbed.tiny(image__depth=1, **MODELS[name])
    params, module = perturbed.params(model), grain.GRAIN(model)
    rng, count = np.random.default_rng(3), 12
    padded = rng.normal(size=(5, LENGTH, PATCH**2 * 3)).astype(np.float32)
    grid = np.array([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)], np.int32)
    corners = np.sort(rng.uniform(-0.2, 1.2, (5, 3, 2, 2)), axis=2)
    boxes = corners.reshape(5, 3, 4).astype(np.float32)

    def all_of(module, image):
        tokens, at = module.image_tokens(image), module.places(image)
        found = dict(embeddings=module.embeddings(tokens, places=at))
        if model.boxes.kind != "none":
            found["boxes"] = module.box_embeddings(tokens, boxes, at)
        if model.decoder is None:
            values = module.image_values(image)
            found["patches"] = module.patch_embeddings(values, at)[:, :count]
        return found

    @jax.jit
    def with_gradients(params, image):
        def scalar(params):
            found = module.apply({"params": params}, image, method=all_of)
            wave = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape))
            return sum(map(wave, jax.tree.leaves(found))), found

        return jax.grad(scalar, has_aux=True)(params)

    alone = with_gradients(params, Patches(padded[:, :count], grid))
    _near(with_gradients(params, Patches(padded, grid)), alone)


def test_a_square_is_the_same_image():
    """Given as patches, with padding, or as all patches that are kept."""
    model = perturbed.tiny(image__depth=1, decoder__depth=1, boxes__kind="roi_align")
    params, rng = perturbed.params(model), np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    own = np.pad(places.of_pixels(image, PATCH), ((0, 0), (0, 3), (0, 0)))
    boxes = np.array([[[0.1, 0.2, 0.7, 0.8], [0, 0, 1, 1]]] * 2, np.float32)
    every = jnp.tile(jnp.arange(25), (2, 1))

    def all_of(module, image, kept=None):
        tokens, at = module.image_tokens(image, kept=kept), module.places(image, kept)
        return module.embeddings(tokens, places=at), module.box_embeddings(tokens, boxes, at)

    run = jax.jit(functools.partial(grain.GRAIN(model).apply, {"params": params}, method=all_of))
    expected = run(image)
    for other in (run(Patches(own, jnp.full((2, 2), 5))), run(image, every)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, expected)
    own_boxes = box_head.token_boxes(27, 2, places.of_square(1, 5))
    np.testing.assert_allclose(own_boxes[0], box_head.token_boxes(27, 2), atol=1e-7)


def test_roi_align_of_maps_is_torchvisions():
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(-0.3, 1.3, (5, 3, 2, 2)), axis=2).reshape(5, 3, 4)
    boxes = boxes.astype(np.float32)
    patches = rng.normal(size=(5, LENGTH, 6)).astype(np.float32)
    align = jax.jit(functools.partial(box_head.roi_align_at, bins=3, samples=2))
    found = align(patches, places.of_grid(GRIDS, LENGTH), boxes)
    for i, (h, w) in enumerate(GRIDS):
        features = torch.tensor(patches[i, : h * w]).reshape(1, h, w, 6).permute(0, 3, 1, 2)
        pixels = torch.tensor(boxes[i] * [w, h, w, h], dtype=torch.float32)
        expected = torchvision.ops.roi_align(features, [pixels], 3, 1.0, 2, aligned=True)
        np.testing.assert_allclose(found[i], expected.permute(0, 2, 3, 1), atol=1e-5)


def test_roi_align_of_some_patches_is_their_weighted_mean():
    """The weights are those of torchvision, which says by a map of ones at a patch what it has in each bin.

    What is kept has the weight of all patches, less than 1 in a bin that reaches over the edge.
    """
    rng, (h, w) = np.random.default_rng(1), (4, 3)
    kept, box = np.array([0, 4, 5, 11]), np.array([-0.3, 0.05, 0.9, 0.8], np.float32)
    patches = rng.normal(size=(1, 4, 6)).astype(np.float32)
    at = places.at(places.of_grid(jnp.array([[h, w]]), 12), jnp.asarray(kept)[None])
    found = box_head.roi_align_at(patches, at, box[None, None], bins=4, samples=2)[0, 0]
    ones = torch.eye(12).reshape(12, 1, h, w)
    pixels = [torch.tensor(box * [w, h, w, h], dtype=torch.float32)[None]] * 12
    weights = torchvision.ops.roi_align(ones, pixels, 4, 1.0, 2, aligned=True)[:, 0].numpy()
    of_all, weights = weights.sum(0), weights[kept]
    total = weights.sum(0)
    assert (of_all[total > 0] < 0.9).any()
    assert (total == 0).any() and (total > 0).any()
    share = np.divide(weights * of_all, total, out=np.zeros_like(weights), where=total > 0)
    np.testing.assert_allclose(found, np.einsum("nij,ne->ije", share, patches[0]), atol=1e-5)


def test_the_text_decoder_sees_real_patches_alone():
    """In training, and as it writes."""
    size = of_decoder.WORDS.size
    module, params, patches, rows = of_decoder.case()
    real, rest = patches.shape[1], 4
    noise = jax.random.normal(jax.random.key(0), (len(patches), rest, patches.shape[2]))
    padded = jnp.concatenate([patches, noise], 1)
    at = places.of_grid(jnp.full((len(patches), 2), 3), real + rest)
    apply = functools.partial(module.apply, {"params": params})
    tokens, count = jnp.tile(jnp.arange(3), (len(patches), 1)), jnp.full(len(patches), 3)

    @jax.jit
    def both(patches, at=None):
        features = apply(patches, rows, None, at, method=module.features)
        _, state = apply(patches, tokens, count, 5, at, method=module.start)
        return features, apply(state, tokens[:, 0], method=module.step)[0][:, :size]

    for found, expected in zip(both(padded, at), both(patches)):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_tower_does_not_take_is_a_line():
    apply = functools.partial(grain.GRAIN.init, method="image_tokens", rngs=jax.random.key(0))
    colours = grain.GRAIN(config_lib.from_dict(dictionary()).model)
    for line, model, image in (
        ("Colours takes squares of all their patches, expected a tower with any", colours, 192),
        (r"got patches \[1, 4, 75\], expected \[images, patches, 192\]", perturbed.tiny(), 75),
    ):
        model = model if isinstance(model, grain.GRAIN) else grain.GRAIN(model)
        image = Patches(np.zeros((1, 4, image), np.uint8), np.full((1, 2), 2, np.int32))
        with pytest.raises(errors.UserError, match=line) as error:
            apply(model, image=image)
        assert "\n" not in str(error.value)
