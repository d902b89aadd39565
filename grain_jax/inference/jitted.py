"""The jitted programs of a model. Parameters are arguments, so Predictors of one configuration share them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax.core import boxes as boxes_lib
from grain_jax.core import schema
from grain_jax.models import grain, placement


@functools.lru_cache(maxsize=64)
def program(model: config_lib.Model, dtype: str, method: str) -> Callable[..., Any]:
    """The jitted (params, *arrays) -> what this method of `models.grain.GRAIN` returns."""
    return jax.jit(_method(model, dtype, method))


@functools.lru_cache(maxsize=64)
def on_mesh(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """One of the programs here for sharded parameters; rows and results are cut over all axes of the mesh."""

    @functools.wraps(program)
    def placed(params, *rows):
        with placement.on(mesh, mesh.axis_names):
            return inspect.unwrap(program)(params, *rows)  # a trace of the jitted one may have no mesh

    return jax.jit(placed, out_shardings=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _method(model: config_lib.Model, dtype: str, method: str) -> Callable[..., Any]:
    """`program`, before it is jitted."""
    module = grain.GRAIN(model, dtype)
    # "highest": full float32 also on devices that round the operands of a matrix product by default.
    precision = "highest" if dtype == "float32" else None

    def apply(params: Any, *arrays: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return module.apply({"params": params}, *arrays, method=method)

    apply.__name__ = method  # the name of the compiled program in profiles
    return apply


@functools.lru_cache(maxsize=64)
def image_program(model: config_lib.Model, dtype: str, head: str = "embeddings") -> Callable[..., Any]:
    """The jitted (params, image, *arrays) -> what the head makes of the tokens of images.

    `image` is [B, S, S, 3], uint8 or normalised float32, or the images' tokens, which have fewer axes. The
    head "embeddings" gives image_embed [B, D] and the regions (schema.Regions), and "regions_by_box_head" the
    same, with the box head's embeddings of the predicted boxes. Others are methods of GRAIN that take tokens.
    """
    run = functools.partial(_method, model, dtype)

    def encode_images(params, image, *arrays):
        tokens = run("image_tokens")(params, image) if image.ndim == 4 else image
        if head not in ("embeddings", "regions_by_box_head"):
            return run(head)(params, tokens, *arrays)
        image_embed, region_embed, boxes, token_boxes = run("embeddings")(params, tokens)
        boxes, prior = boxes[:, -1], jnp.zeros(region_embed.shape[:2])
        if model.boxes.proposals:
            boxes = token_boxes.boxes_cxcywh
            prior = model.boxes.object_weight * jax.nn.log_sigmoid(token_boxes.logit)
        corners = jnp.clip(boxes_lib.cxcywh_to_xyxy(boxes), 0.0, 1.0)
        if model.boxes.proposals or head == "regions_by_box_head":
            region_embed = run("box_embeddings")(params, tokens, corners)
        return image_embed, schema.Regions(corners, region_embed, prior)

    return jax.jit(encode_images)


@functools.lru_cache(maxsize=8)
def text_program(model: config_lib.Model, dtype: str) -> Callable[..., Any]:
    """The jitted encode_texts(params, tokens int32 [N, L], ends of the texts int32 [N]) -> [N, D].

    Each text is a packing group of its own, so that devices need no communication.
    """
    apply = _method(model, dtype, "encode_text")

    def encode_texts(params, tokens, ends):
        tokens = tokens[:, None]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
        segments = jnp.ones_like(positions)
        if model.text.mask_padding:
            segments = (positions <= ends[:, None, None]).astype(jnp.int32)
        (embed,) = apply(params, tokens, positions, segments, jnp.stack([jnp.zeros_like(ends), ends], axis=1))
        return embed

    return jax.jit(encode_texts)
