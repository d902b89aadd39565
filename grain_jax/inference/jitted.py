"""The jitted programs of a model. Parameters are arguments, so Predictors with one model configuration share them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.inference.inputs import Tokens
from grain_jax.losses import boxes as boxes_lib
from grain_jax.models import grain


def _applied(model: config_lib.Model, dtype: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """(params, *arguments) -> what the method of the model returns; of Tokens it gets the values."""
    module = grain.GRAIN(model, dtype)
    # "highest": full float32 also on devices that by default round the operands of a matrix product.
    precision = "highest" if dtype == "float32" else None

    def apply(params: Any, *arguments: Any) -> Any:
        if isinstance(arguments[0], Tokens):
            arguments = arguments[0].values, *arguments[1:]
        with jax.default_matmul_precision(precision):
            return module.apply({"params": params}, *arguments, method=method)

    apply.__name__ = method.__name__  # of the compiled program, in profiles
    return apply


@functools.lru_cache(maxsize=8)
def image_program(
    model: config_lib.Model, dtype: str, of_tokens: bool = False
) -> Callable[..., Any]:
    """The jitted encode_images(params, image) -> image_embed [B, D], region_embed [B, Q, D], boxes_xyxy [B, Q, 4].

    `image` is [B, S, S, 3], uint8, or float32 normalised. With `of_tokens`, it is their Tokens.
    """
    method = grain.GRAIN.embeddings if of_tokens else grain.GRAIN.encode_image
    apply = _applied(model, dtype, method)

    def encode_images(params, image):
        image_embed, region_embed, boxes = apply(params, image)
        return image_embed, region_embed, jnp.clip(boxes_lib.cxcywh_to_xyxy(boxes[-1]), 0.0, 1.0)

    return jax.jit(encode_images)


@functools.lru_cache(maxsize=8)
def text_program(model: config_lib.Model, dtype: str) -> Callable[..., Any]:
    """The jitted encode_texts(params, tokens int32 [N, L], ends int32 [N]) -> [N, D].

    `ends` are the positions of the texts' last tokens.
    """
    apply = _applied(model, dtype, grain.GRAIN.encode_text)

    def encode_texts(params, tokens, ends):
        # One group per text, so that the devices need no communication.
        tokens = tokens[:, None]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
        at = jnp.stack([jnp.zeros_like(ends), ends], axis=1)
        segments = jnp.ones_like(positions)
        if model.text.mask_padding:
            segments = (positions <= ends[:, None, None]).astype(jnp.int32)
        (embed,) = apply(params, tokens, positions, segments, at)
        return embed

    return jax.jit(encode_texts)


@functools.lru_cache(maxsize=32)
def program(model: config_lib.Model, dtype: str, method: str) -> Callable[..., Any]:
    """The jitted (params, *arguments) -> what that method of `models.grain.GRAIN` returns."""
    return jax.jit(_applied(model, dtype, getattr(grain.GRAIN, method)))


@functools.lru_cache(maxsize=8)
def tokens_program(
    model: config_lib.Model, dtype: str, method: str = "image_tokens"
) -> Callable[..., Tokens]:
    """The jitted (params, images) -> Tokens, by `image_tokens` or `image_values` of the model."""
    apply = _applied(model, dtype, getattr(grain.GRAIN, method))

    def encode_tokens(params, image):
        return Tokens(apply(params, image))

    return jax.jit(encode_tokens)
