"""Towers: what encodes images and texts, chosen by `model.image.tower` and `model.text.tower`.

A tower is a built-in one or a class of a user, `module:Class`, that derives from `ImageTower` or `TextTower`;
examples/tower has one of each. What all towers share is the model's (models/grain.py): it normalises pixels
before the image tower. After the towers it pools, norms text features, projects, and scales to unit length.

- Parameters: each names its logical axes (`layers.parameter`, `layers.dense`, nn.with_logical_partitioning);
  `config.sharding` maps them to mesh axes; an axis without a row there is an error.
  They are float32 and lie below "image/" or "text/".
- Placement: XLA places activations; `placement.by_batch(x)` after each layer keeps them with the batch.
- Rematerialisation: `layers.scan_layers` applies `remat`; another tower applies nn.remat with `layers.REMAT`.
- Layer-wise decay (`optim.layer_decay`) needs layers stacked below "blocks", as `layers.scan_layers` does.
- Options: `Options` is a frozen dataclass; `model.image.options` is one, checked key by key with the config.
"""

from collections.abc import Mapping
from typing import ClassVar, TypeVar

import flax.linen as nn
import jax
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import errors, named

IMAGE = {"vit": "grain_jax.models.vit:ImageTransformer"}
TEXT = {"transformer": "grain_jax.models.text:TextTransformer"}


class ImageTower(nn.Module):
    """An image tower: normalised images to tokens.

    Attributes:
      config: `model.image`. Every tower has `image_size`, `pixel_mean`, `pixel_std`, `pool` and `projection`;
        of the other keys it reads what it needs (width, depth, ...), and `config.options`.
      dtype: of activations.
      remat: what the backward pass keeps, "none" or a key of `layers.REMAT`.
      attention: `model.attention`, the program of self-attention; a tower without attention ignores it.
      lora: the scale of the factors of LoRA beside the dense maps of built-in towers; 0: without.
    """

    config: config_lib.ImageTower
    dtype: np.dtype
    remat: str = "none"
    attention: str = "auto"
    lora: float = 0.0

    Options: ClassVar[type | None] = None
    # True: the tower gives one vector an image, [B, E]. It needs `model.decoder=None` and `pool="none"`.
    pooled: ClassVar[bool] = False
    # True: it takes square images of other sizes than `image_size`, as a loss term may ask for them.
    any_size: ClassVar[bool] = False
    # True: `__call__` also takes `kept`, int32 [B, n], the patches to see (`model.image.keep`).
    takes_kept: ClassVar[bool] = False

    @classmethod
    def leading_tokens(cls, config: config_lib.ImageTower) -> int:
        """Tokens that stand for no place in the image, and come first; `pool="mean"` leaves them out."""
        del config
        return 0

    def __call__(self, image: jax.Array) -> jax.Array:
        """Normalised images, float32 [B, S, S, 3], -> normed tokens [B, N, E] (or [B, E], `pooled`)."""
        raise NotImplementedError


class TextTower(nn.Module):
    """A text tower: rows of tokens to the features of every position. examples/tower/windows.py is one.

    Attributes:
      config: `model.text`. Every tower has `vocab_size`, `context_length`, `norm_eps`, `pool`, `projection`,
        `tokenizer`, `cleaning` and `pad_id`; of the other keys it reads what it needs, and `config.options`.
      dtype, remat, attention, lora: as of `ImageTower`.
    """

    config: config_lib.TextTower
    dtype: np.dtype
    remat: str = "none"
    attention: str = "auto"
    lora: float = 0.0

    Options: ClassVar[type | None] = None
    # True: the tower gives one vector a row, [G, rows, E], which is only projected. It is not packable.
    pooled: ClassVar[bool] = False

    @classmethod
    def packable(cls, config: config_lib.TextTower) -> bool:
        """Whether texts may share a row: no feature of a text depends on what else is in its row."""
        del config
        return False

    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """Features of every position of the rows, before the last norm.

        The model reads them at the end token of each text (`pool="end"`), or pools a row that is one text.

        Args:
          tokens: int32 [G, rows, L], 0 in the padding.
          positions: int32 [G, rows, L], from 0 in each text.
          segments: int32 [G, rows, L], 1, 2, ... for the texts of a row, 0 for padding.

        Returns:
          [G, rows, L, E]; or [G, rows, E], `pooled`.
        """
        raise NotImplementedError


def image_tower(config: config_lib.ImageTower) -> type[ImageTower]:
    """The class that `model.image.tower` names. Raises UserError."""
    return _find("model.image.tower", config.tower, IMAGE, ImageTower)


def text_tower(config: config_lib.TextTower) -> type[TextTower]:
    """The class that `model.text.tower` names. Raises UserError."""
    return _find("model.text.tower", config.tower, TEXT, TextTower)


T = TypeVar("T", bound=nn.Module)


def _find(key: str, name: str, built_in: Mapping[str, str], base: type[T]) -> type[T]:
    tower = named.find(key, built_in.get(name, name), built_in)
    if not (isinstance(tower, type) and issubclass(tower, base)):
        raise errors.UserError(
            f"{key}: {name} is {tower!r}, expected a class that derives from"
            f" grain_jax.models.towers.{base.__name__}"
        )
    return tower
