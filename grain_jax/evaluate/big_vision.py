"""Adapter that lets the evaluators of big_vision use a GRAIN checkpoint.

Put these lines into a config file of big_vision, or run them before its evaluators are created (docs/library.md):

  from grain_jax.evaluate import big_vision
  big_vision.register()
  config.model_name, config.model, config.model_init = "grain_jax", dict(checkpoint=DIR), DIR
  pp_img, pp_txt = "grain_image('DIR')", "grain_text('DIR')"

Written for commit 0127fb6 of big_vision. Only `register` imports big_vision, and only the two preprocessing ops
import TensorFlow.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import errors
from grain_jax.core import images as image_files
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain

NAME = "grain_jax"  # value of config.model_name in big_vision
_PADDING = -1  # padding id after a text; no token has it


class BigVisionError(errors.UserError):
    """big_vision is missing, or uses the adapter in a way that it does not support; the message is one line."""


def register() -> None:
    """Registers the model and the two preprocessing ops with big_vision.

    Raises:
      BigVisionError: big_vision is not on the path.
    """
    try:
        # Not a dependency of this package.
        from big_vision.pp import registry  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "big_vision":
            raise
        raise BigVisionError(
            "big_vision: not on the path; clone github.com/google-research/big_vision and add the"
            " folder to PYTHONPATH"
        ) from None
    # The trainers of big_vision import big_vision.models.{config.model_name}.
    sys.modules[f"big_vision.models.{NAME}"] = sys.modules[__name__]
    for name, op in (("grain_image", grain_image), ("grain_text", grain_text)):
        registry.Registry.register(f"preprocess_ops.{name}", replace=True)(op)


class Model(nn.Module):
    """The interface of two_towers.Model of big_vision, with the parameters of `grain.GRAIN`.

    Attributes:
      checkpoint: workdir, checkpoint or converted folder with the configuration of the model.
      dtype: of activations, "float32" (at full precision on every device) or "bfloat16".
    """

    checkpoint: str
    dtype: str = "float32"

    def setup(self):
        self.grain = grain.GRAIN(_sizes(self.checkpoint).model, self.dtype)
        nn.share_scope(self, self.grain)  # parameters are named as in the checkpoint

    @nn.nowrap
    def init(self, *args, **kwargs):
        """As `init` of flax, but with plain arrays, because big_vision does not know logical axes."""
        return nn.unbox(super().init(*args, **kwargs))

    def __call__(self, image, text=None, train: bool = False):
        """Embeds images, texts or both; either may be None.

        Args:
          image: uint8 [B, S, S, 3], or float32 normalised with `model.image.pixel_mean` and `pixel_std`.
          text: int32 [N, L] from `grain_text`; or CLIP token ids with any padding; or SigLIP token ids, padded
            by the op of big_vision; or other token ids, padded with -1. A text with another id than those
            of the embedding table gets NaN.
          train: has to be False.

        Returns:
          (zimg [B, D], ztxt [N, D], out): embeddings of unit length, None if the argument is None. `out` has
          "img/normalized", "txt/normalized", "t" (the logit scale, [1]), "t/parameter" (its
          logarithm), and for a sigmoid loss "b" (the logit bias, [1]).

        Raises:
          BigVisionError: `train` is True.
        """
        if train:
            raise BigVisionError("train: this adapter evaluates; train with `grain-jax train`")
        zimg = ztxt = None
        out = {}
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else None):
            if image is not None:
                zimg = self.grain.encode_image(jnp.asarray(image))[0]
                out["img/normalized"] = zimg
            if text is not None:
                ztxt = self._encode_text(jnp.asarray(text))
                out["txt/normalized"] = ztxt
        out["t/parameter"] = jnp.asarray(self.grain.logit_scale)[None]
        out["t"] = jnp.exp(out["t/parameter"])
        if self.grain.config.logit_bias_init is not None:
            out["b"] = jnp.asarray(self.grain.logit_bias)[None]
        return zimg, ztxt, out

    def _encode_text(self, tokens):
        tower = self.grain.config.text
        if not tower.packable:  # the tower sees the padding
            missing = tower.context_length - tokens.shape[1]
            tokens = jnp.pad(tokens, ((0, 0), (0, missing)), constant_values=_PADDING)
        real = tokens != _PADDING
        # With CLIP the end token has the highest id; with other tokenizers it is the last token before the padding, or
        # the first of its id, which may pad, too.
        ends = tokens.argmax(1) if tower.tokenizer == "clip" else real.sum(1) - 1
        if tower.mask_padding and tower.end_id is not None:
            ends = tower.ends(tokens)
        tokens = jnp.where(real, tokens, tower.pad_id)[:, None]  # one group per text
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
        at = jnp.stack([jnp.zeros_like(ends), ends], axis=1)
        segments = jnp.ones_like(positions)
        if tower.mask_padding:
            segments = (positions <= ends[:, None, None]).astype(jnp.int32)
        (embed,) = self.grain.encode_text(tokens, positions, segments, at)
        known = ((tokens >= 0) & (tokens < tower.vocab_size)).all(axis=(1, 2))
        return jnp.where(known[:, None], embed, jnp.nan)


def load(init_params: Any, init_file: str, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the parameters of a checkpoint; the trainers of big_vision call this for `config.model_init`.

    Args:
      init_params: the result of `Model.init`; unused, since the checkpoint has every parameter.
      init_file: workdir, checkpoint or converted folder.
      model_cfg: the arguments of `Model`; its `checkpoint` may differ from `init_file` if the model is the same.

    Raises:
      BigVisionError: the models of the two checkpoints differ.
      checkpoint.CheckpointError: there is no checkpoint.
    """
    del init_params
    if not isinstance(init_file, str):
        raise BigVisionError(
            f"model_init: got {init_file!r}, expected the path of one checkpoint of grain_jax"
        )
    ours, theirs = (
        _without_keep(_sizes(path).model) for path in (init_file, model_cfg["checkpoint"])
    )
    if ours != theirs:
        raise BigVisionError(
            f"model_init: {init_file} has another model than model.checkpoint,"
            f" {model_cfg['checkpoint']}; expected the same towers"
        )
    return saved_model.load_model(init_file)[1]


def _without_keep(model: config_lib.Model) -> config_lib.Model:
    """The model with the default of the key that says how many patches training sees."""
    image = dataclasses.replace(model.image, keep=config_lib.ImageTower().keep)
    return dataclasses.replace(model, image=image)


def predict_fn(model: Model) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    """The function that the evaluators of big_vision call: ({"params": ...}, {"image" or "labels": ...}) -> `Model`."""

    def predict(train_state, batch):
        variables = {"params": train_state["params"]}
        return model.apply(variables, batch.get("image"), batch.get("labels"))

    return predict


def grain_image(checkpoint: str, key: str = "image") -> Callable[[dict], dict]:
    """Preprocessing op: uint8 [H, W, 3] or file bytes -> uint8 [S, S, 3], resized as in `grain_jax.evaluate`."""
    size = _sizes(checkpoint).model.image.image_size

    def resize(image):
        if isinstance(image, bytes):
            image = image_files.decode_image(image, orientation="file")  # as big_vision does
        return image_files.resize(image, size)

    return _op(resize, key, key, "uint8", (size, size, 3))


def grain_text(checkpoint: str, inkey: str = "texts", outkey: str = "labels") -> Callable:
    """Preprocessing op: a string -> int32 [context length] by the tokenizer of the text tower, padded with -1."""
    model, folder = _sizes(checkpoint)
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


class _Sizes(NamedTuple):
    model: config_lib.Model
    folder: str


@functools.lru_cache(maxsize=8)
def _sizes(path: str) -> _Sizes:
    """The model in a checkpoint without its parameters, and the folder of the checkpoint."""
    stored = saved_model.load_stored(path)
    return _Sizes(stored.model, stored.folder)
