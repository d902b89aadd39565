"""A model small enough to compile in seconds, and a random batch for it."""

import jax
import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.configs import regions
from grain_jax.core import schema
from grain_jax.runtime import ending
from grain_jax.train import forward, sharding, train_step
from tests import runs

SHALLOW = {f"model__{tower}__depth": 1 for tower in ("image", "text", "decoder")}
# Towers alone: the decoder takes longest to compile.
TWO_TOWERS = {"model__decoder": None, "model__image__pool": "mean", "input__max_regions": 0}
TWO_SHALLOW = TWO_TOWERS | {"model__image__depth": 1, "model__text__depth": 1}


class EndsAt(ending.PreemptionHandler):
    """Tells the run to end after so many steps."""

    def __init__(self, step):
        super().__init__()
        self._left = step

    def reached(self, step):
        del step
        self._left -= 1
        return self._left <= 0


def dictionary(**overrides):
    """A ConfigDict of a very small run on the synthetic source; keys as flattened paths with `__` for `.`."""
    c = recipe.base("tiny")
    c.update(total_steps=10, batch_size=16, dtype="float32", log_every=1, checkpoint_every=4)
    c.optim.warmup_steps = 2
    c.input.update(source="synthetic", lanes=4)
    c.text.update(pack_group=2, pack_rows=8)
    c.model.image.update(image_size=16, width=32, depth=2, unroll=1, mlp_dim=64)
    c.model.text.update(width=32, depth=2, unroll=1, mlp_dim=64, context_length=32)
    c.model.decoder.update(width=32, depth=2, unroll=1, mlp_dim=64)
    c.model.embed_dim = 16
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


def config(**overrides) -> config_lib.Config:
    return config_lib.from_dict(dictionary(**overrides))


def small(**overrides) -> config_lib.Config:
    """`config` with as little to compile, to step and to store as there can be."""
    return config(**{k.replace(".", "__"): v for k, v in runs.SMALL.items()} | overrides)


def regions_of(folder, **overrides):
    """A small run of the config `regions` on the folder, with the synthetic source."""
    c, small = regions.get_config(str(folder)), dictionary()
    for group in ("input", "text"):
        c[group] = small[group]
    c.text.packing = False
    c.update(batch_size=16, dtype="float32", total_epochs=None, total_steps=10)
    c.optim.update(warmup_epochs=None, warmup_steps=2)
    c.model.decoder.update({k: v for k, v in small.model.decoder.items() if k != "image_pool"})
    c.evals = {}
    c.update_from_flattened_dict(overrides)
    return config_lib.from_dict(c)


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """The mesh of the first devices."""
    axes = config_lib.Mesh(data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(axes, jax.devices()[: data * fsdp * tensor])


def program(c: config_lib.Config, devices: int | None = None) -> train_step.Program:
    """The program of a run of 10 steps on so many devices, or all."""
    of_run = sharding.make_mesh(c.mesh, jax.devices()[:devices])
    return train_step.build(c, of_run, total_steps=10, steps_per_epoch=1)


def batch(c: config_lib.Config, seed: int = 0) -> schema.Batch:
    """Random images, boxes, masks and packed texts of 7 tokens; some are equal, some negatives masked."""
    rng = np.random.default_rng(seed)
    shapes = forward.abstract_batch(c)
    (b, r), captions = shapes.region_mask.shape, shapes.caption_mask.shape[1]
    h = c.input.negatives_per_region
    texts = captions + r * (1 + h)  # of an image
    groups, rows, length = shapes.text_tokens.shape
    a_row = length // 7
    assert rows * a_row * groups >= b * texts, "the texts do not fit"
    order = np.arange(rows * a_row)
    slots = np.stack([rng.permutation(order)[: b // groups * texts] for _ in range(groups)])
    slots = slots.reshape(b, texts)
    end_at = np.stack([slots // a_row, slots % a_row * 7 + 6], axis=-1).astype(np.int32)
    negative_at, negative_mask = (end_at[:, captions + r :].reshape(b, r, h, 2), np.ones((b, r, h), bool))
    negative_mask &= np.random.default_rng(seed + 1).random((b, r, h)) < 0.6
    column = np.arange(length)
    low = rng.uniform(0, 0.6, (b, r, 2))
    size = rng.uniform(0.1, 0.4, (b, r, 2))
    batch = schema.Batch(
        image=rng.integers(0, 256, shapes.image.shape).astype(np.uint8),
        text_tokens=rng.integers(1, 400, shapes.text_tokens.shape).astype(np.int32),
        text_positions=np.broadcast_to(column % 7, shapes.text_tokens.shape).astype(np.int32),
        text_segments=np.broadcast_to(1 + column // 7, shapes.text_tokens.shape).astype(np.int32),
        caption_at=end_at[:, :captions],
        caption_id=(np.arange(b * captions, dtype=np.int32) * 2 // 3).reshape(b, captions),
        caption_mask=np.arange(b * captions).reshape(b, captions) % 4 < (4 if captions == 1 else 3),
        description_at=end_at[:, captions : captions + r],
        description_id=rng.integers(0, 3 * b, (b, r)).astype(np.int32),
        region_boxes_cxcywh=np.concatenate([low + size / 2, size], -1).astype(np.float32),
        region_mask=rng.random((b, r)) < 0.7,
        texts_dropped=rng.integers(0, 2, groups).astype(np.int32),
        text_counts=rng.integers(0, 2, (groups, 2)).astype(np.int32) + b // groups * texts,
    )
    if not h:
        return batch
    negative_mask &= batch.region_mask[..., None]
    return batch._replace(negative_at=negative_at, negative_mask=negative_mask)


def params(shapes, spread: float = 0.1):
    """Random parameters of these shapes, as NumPy arrays: to compile `init` takes longer than a step."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = {"logit_scale": np.log(1 / 0.07)}.get(name, float(name.endswith("/scale")))
        return np.float32(value + (name != "logit_scale") * rng.normal(0, spread, x.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def state(program: train_step.Program) -> train_step.TrainState:
    """Step 0 with random parameters, as NumPy arrays."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.state)
    drawn = params(program.state.params)
    return zeros._replace(params=drawn, ema_params=drawn if program.state.ema_params else {})
