"""Adapter that lets the evaluators of big_vision, commit 0127fb6, use a checkpoint (docs/library.md).

Only `register` imports big_vision, and only the two preprocessing ops import TensorFlow.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import images as image_files
from grain_jax.inference import jitted
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain

NAME = "grain_jax"  # value of config.model_name in big_vision
_PADDING = -1  # padding id after a text; no token has it


def register() -> None:
    """Registers the model and the two preprocessing ops with big_vision, which has to be on the path."""
    from big_vision.pp import registry  # pyright: ignore[reportMissingImports]

    # The trainers of big_vision import big_vision.models.{config.model_name}.
    sys.modules[f"big_vision.models.{NAME}"] = sys.modules[__name__]
    for name, op in (("grain_image", grain_image), ("grain_text", grain_text)):
        registry.Registry.register(f"preprocess_ops.{name}", replace=True)(op)


@dataclasses.dataclass(frozen=True)
class Model:
    """`init` and `apply` as two_towers.Model of big_vision has them, with the parameters of `grain.GRAIN`."""

    checkpoint: str  # workdir, checkpoint or converted folder

    def init(self, key: jax.Array, *_: Any, **__: Any) -> dict[str, Any]:
        """{"params": new parameters}, whatever images and texts big_vision passes."""
        return {"params": nn.unbox(grain.init(grain.GRAIN(_stored(self.checkpoint)[0]), key))}

    def apply(
        self, variables: Mapping[str, Any], image=None, text=None, **_: Any
    ) -> tuple[jax.Array | None, jax.Array | None, dict[str, Any]]:
        """Embeds images, texts or both; either may be None.

        Args:
          variables: {"params": the parameters}.
          image: uint8 [B, S, S, 3], or float32 normalised with `model.image.pixel_mean` and `pixel_std`.
          text: int32 [N, L] from `grain_text`; or CLIP token ids with any padding; or SigLIP token ids,
            padded by the op of big_vision; or other ids, padded with -1. An unknown id makes NaN of its text.

        Returns:
          (zimg [B, D], ztxt [N, D], out): embeddings of unit length, or None. `out` has "img/normalized",
          "txt/normalized", "t" (the logit scale, [1]), its logarithm "t/parameter", and for a sigmoid loss
          "b" (the logit bias, [1]). For images it also has the fields of schema.Regions, "regions/boxes_xyxy"
          and so on, which are empty for a model without regions.
        """
        (model, _), params = _stored(self.checkpoint), variables["params"]
        scale = jnp.asarray(params["logit_scale"])[None]
        zimg, ztxt, out = None, None, {"t/parameter": scale, "t": jnp.exp(scale)}
        if "logit_bias" in params:
            out["b"] = jnp.asarray(params["logit_bias"])[None]
        if image is not None:
            encode = jitted.image_program(model, "float32")
            zimg, regions = encode(params, jnp.asarray(image))
            out["img/normalized"] = zimg
            out |= {f"regions/{name}": value for name, value in regions._asdict().items()}
        if text is not None:
            out["txt/normalized"] = ztxt = self._encode_text(model, params, jnp.asarray(text))
        return zimg, ztxt, out

    def _encode_text(self, model: config_lib.Model, params: Any, tokens: jax.Array) -> jax.Array:
        tower = model.text
        if not tower.packable:  # the tower sees the padding
            missing = tower.context_length - tokens.shape[1]
            tokens = jnp.pad(tokens, ((0, 0), (0, missing)), constant_values=_PADDING)
        real = tokens != _PADDING
        # With CLIP the end token has the highest id; with other tokenizers it is the last token before the
        # padding, or the first of its id, which may pad, too.
        ends = tokens.argmax(1) if tower.tokenizer == "clip" else real.sum(1) - 1
        if tower.mask_padding and tower.has_end_id:
            ends = tower.ends(tokens)
        tokens = jnp.where(real, tokens, tower.pad_id)
        embed = jitted.text_program(model, "float32")(params, tokens, ends)
        known = ((tokens >= 0) & (tokens < tower.vocab_size)).all(axis=1)
        return jnp.where(known[:, None], embed, jnp.nan)


def load(init_params: Any, init_file: str, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the checkpoint of `Model`, whose arguments are `model_cfg`, for `config.model_init`.

    `init_params` and `init_file`, which names the same checkpoint, are not used. Raises
    checkpoint.CheckpointError if there is none.
    """
    del init_params, init_file
    return saved_model.load_model(model_cfg["checkpoint"])[1]


def predict_fn(model: Model) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    """What big_vision's evaluators call: ({"params": ...}, {"image" or "labels": ...}) -> `Model.apply`."""
    return lambda state, batch: model.apply(state, batch.get("image"), batch.get("labels"))


def grain_image(checkpoint: str, key: str = "image") -> Callable[[dict], dict]:
    """Preprocessing op: uint8 [H, W, 3] or file bytes -> uint8 [S, S, 3], resized as by our evaluators."""
    size = _stored(checkpoint)[0].image.image_size

    def resize(image):  # decoded as big_vision does
        image = image_files.decode_image(image, orientation="file") if isinstance(image, bytes) else image
        return image_files.resize(image, size)

    return _op(resize, key, key, "uint8", (size, size, 3))


def grain_text(checkpoint: str, inkey: str = "texts", outkey: str = "labels") -> Callable:
    """Preprocessing op: a string -> int32 [context length] by the tower's tokenizer, padded with -1."""
    model, folder = _stored(checkpoint)
    library, context = tokenizer.of_tower(model.text, folder), model.text.context_length

    def tokenize(text):
        ids = library.encode([text], context).ids
        return np.pad(ids, (0, context - len(ids)), constant_values=_PADDING)

    return _op(tokenize, inkey, outkey, "int32", (context,))


def _op(function: Callable, inkey: str, outkey: str, dtype: str, shape: tuple) -> Callable:
    """The preprocessing op that puts `function` of the value of `inkey` at `outkey`."""
    import tensorflow as tf

    def op(data):
        value = tf.numpy_function(function, [data[inkey]], tf.as_dtype(dtype))
        return {**data, outkey: tf.ensure_shape(value, shape)}

    return op


@functools.lru_cache(maxsize=8)
def _stored(path: str) -> tuple[config_lib.Model, Any]:
    """The model in a checkpoint without its parameters, and the folder of the checkpoint."""
    stored = saved_model.load_stored(path)
    return stored.model, stored.folder
