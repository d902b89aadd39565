"""FLOPs against hand counts, published profiles of CLIP's towers, the model's jaxpr and XLA's own count."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from grain_jax import config as config_lib
from grain_jax.config import recipe as recipes
from grain_jax.input_pipeline import derived
from grain_jax.models.grain import GRAIN
from grain_jax.train import flops, forward, optim, train_step
from tests import tiny

pytestmark = pytest.mark.long


def unplanned(size: str = "B/16", **overrides) -> config_lib.Config:
    c = recipes.base(size)
    c.total_steps, c.optim.warmup_steps, c.dtype = 10, 2, "float32"
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config_lib.from_dict(c)


@functools.cache
def recipe(size: str = "B/16", **overrides) -> config_lib.Config:
    """The same, with rows for its texts."""
    return derived.planned(unplanned(size, **overrides), derived.Limits())[0]


def shapes(config):
    """(the config's model, shapes of its parameters, shapes of its batch)."""
    model = GRAIN(config.model, config.dtype, config.remat)
    batch = forward.abstract_batch(config)
    return model, nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"], batch


def matmul_flops(function, *arguments):
    return flops.by_module(jax.make_jaxpr(function)(*arguments).jaxpr).total()


def gradient(config, frozen=()):
    """FLOPs of the model's forward and backward pass, of the whole batch."""
    model, params, batch = shapes(config)

    def total(params, batch):
        params = optim.stop_frozen(params, frozen)
        return sum(x.sum() for x in jax.tree.leaves(model.apply({"params": params}, batch)))

    return matmul_flops(jax.grad(total), params, batch)


def test_flops_are_those_of_the_matrix_products():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 7, 11), (11, 13)))
    product = 2 * 5 * 7 * 11 * 13
    assert matmul_flops(jnp.matmul, x, w) == product

    def loss(w, x):
        def body(carry, _):
            return jnp.tanh(jnp.matmul(carry, w)), None

        return jax.lax.scan(body, x, None, length=4)[0].sum()

    square = jax.ShapeDtypeStruct((11, 11), jnp.float32)
    per_trip = 2 * 5 * 7 * 11 * 11
    assert matmul_flops(loss, square, x) == 4 * per_trip
    # Backward: the cotangents of the carry and of w, at each of 4 trips.
    assert matmul_flops(jax.grad(loss), square, x) == 12 * per_trip

    mesh = Mesh(jax.devices()[:4], "data")
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 3), (3, 5)))
    spec = PartitionSpec("data")
    shared = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert matmul_flops(shared, x, w) == 2 * 8 * 3 * 5  # of all devices

    doubled = lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ y, x)
    with pytest.raises(NotImplementedError, match="trips"):
        matmul_flops(doubled, jnp.ones((2, 2)))


# The model_profile.csv of open_clip (ViT-S-16 to ViT-g-14), GFLOPs of an image. It counts an image projection
# that stands in our decoder: 0.003 at most.
@pytest.mark.parametrize("size,gflops", [("S/16", 9.20), ("B/16", 35.13), ("g/14", 534.06)])
def test_image_towers_are_as_published(size, gflops):
    assert flops.per_image(recipe(size)).image / 1e9 == pytest.approx(gflops, abs=0.007)


def test_text_towers_are_as_published():
    padded = flops.per_image(recipe(text__packing=False))
    assert padded.text / 6 / 1e9 == pytest.approx(5.96, abs=0.006)  # a caption and 5 descriptions
    large = flops.per_image(recipe("g/14", text__packing=False))
    assert large.text / 6 / 1e9 == pytest.approx(47.09, abs=0.006)
    packed, projection = flops.per_image(recipe()), 2 * 6 * 512 * 512
    text = recipe().text
    assert text.pack_group == 64
    rows = text.pack_rows / 64
    assert (packed.text - projection) == (padded.text - projection) / 6 * rows


def test_losses_by_hand():
    count = lambda **kw: flops.of_losses(unplanned(**kw))
    captions = 2 * 2048 * 512
    assert count() == captions + 5 * 2 * (2048 * 5) * 512 == flops.per_image(recipe()).losses
    assert count(loss__group_size=128) == captions + 5 * 2 * (128 * 5) * 512
    assert count(batch_size=4096) == 2 * count()
    assert count(input__max_regions=0) == captions
    assert count(input__captions_per_image=3) == count() + 2 * captions
    matched = count(loss__match_description=1.0, model__decoder__queries=7)
    assert matched == count() + 2 * 7 * 5 * 512
    boxes = count(model__boxes__kind="roi_align", loss__box_description=1.0)
    assert boxes == count() + 5 * 2 * (2048 * 5) * 512


@pytest.mark.parametrize(
    "config",
    [
        recipe(),
        tiny.config(
            model__decoder__queries=7,
            input__max_regions=3,
            model__embed_dim=24,
            input__captions_per_image=3,
            input__negatives_per_region=2,
        ),
        tiny.config(text__packing=False),
    ],
    ids=["B/16", "tiny", "padded"],
)
def test_the_backward_pass_has_two_products_for_one(config):
    image, ours = config.model.image, flops.per_image(config)
    pixels = 2 * (image.image_size**2 * 3) * image.width  # nobody asks for their gradient
    assert gradient(config) == (3 * (ours.forward - ours.losses) - pixels) * config.batch_size


@pytest.mark.parametrize(
    "boxes",
    [
        dict(model__boxes__kind="roi_align", model__boxes__bins=3),
        dict(model__boxes__kind="roi_align", model__decoder=None, model__image__pool="mean"),
    ],
    ids=["roi_align", "no decoder"],
)
def test_the_box_head_is_that_of_the_model(boxes):
    config = tiny.config(loss__box_description=1.0, **boxes)
    model, params, batch = shapes(config)
    apply = lambda params, batch: model.apply({"params": params}, batch)
    ours = flops.per_image(config)
    assert matmul_flops(apply, params, batch) == (ours.forward - ours.losses) * config.batch_size


@pytest.mark.parametrize(
    "frozen,parts",
    [
        (("image/.*",), {"image"}),
        (("image/.*", "text.*", "logit_scale"), {"image", "text"}),
        (("decoder/.*", "box_mlp/.*", ".*_projection/.*"), {"decoder"}),
        (("image/blocks/.*", "text_norm/.*"), set()),
    ],
)
def test_what_is_frozen_has_no_gradient_to_compute(frozen, parts):
    config = tiny.config(optim__frozen=frozen)
    ours, image, decoder = flops.per_image(config), config.model.image, config.model.decoder
    assert ours.frozen == parts
    if "decoder" in parts:  # through a decoder of fixed weights the activations' gradient goes
        assert ours.train == 3 * ours.forward - ours.decoder
    elif not parts:
        assert ours.train == 3 * ours.forward
    else:
        spared = 2 * image.image_size**2 * 3 * image.width  # the gradient of the pixels
        if "image" in parts:
            tokens = 1 + (image.image_size // image.patch_size) ** 2
            spared = 2 * tokens * image.width * decoder.width  # of the decoder's input
        expected = (ours.train - 3 * ours.losses - spared) * config.batch_size
        assert gradient(config, frozen) == expected


@pytest.mark.slow
def test_train_step_is_xlas_own_count():
    """Within 2%: XLA counts element-wise work too, and leaves out the gradient of the pixels."""

    def ratio(counted, config):
        return flops.per_image(config).train * config.batch_size / counted.cost_analysis()["flops"]

    def lower(config):
        model, params, batch = shapes(config)
        step = functools.partial(train_step.loss_and_grads, model, config, None)
        return jax.jit(lambda params, batch: step(params, batch, None)).lower(params, batch)

    few = {f"model__{t}__{key}": 2 for t in ("image", "text", "decoder") for key in ("depth", "unroll")}
    # 8 images share 5 rows of text as 64 share 40.
    shallow = recipe(batch_size=8, input__lanes=1, text__pack_group=8, text__pack_rows=5, **few)
    lowered = lower(shallow)
    assert 0.98 < ratio(lowered, shallow) < 1.02  # before XLA's passes
    assert 0.98 < ratio(lowered.compile(), shallow) < 1.02


def test_peaks():
    assert flops.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert flops.peak_flops("TPU v5", "float32") == 459e12  # one bfloat16 pass
    assert flops.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert flops.peak_flops("NVIDIA A100-SXM4-40GB", "float32") == 156e12  # TF32
    for unknown in ("cpu", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert flops.peak_flops(unknown, "bfloat16") is None
