"""Sizes of the models of the PyTorch reference, read from the shapes in their state dicts.

The number of heads is not in a state dict; it comes by flag, from the size of the qk-norm, or is assumed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import towers
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.convert.reference.names import TABLES
from grain_jax.convert.tables import Entries

TOWERS = ("image", "text", "decoder")
# (tower, width) -> heads of the reference's own models (clip/custom_models.py and train.py).
REFERENCE_HEADS = {
    ("image", 384): 12,
    ("image", 768): 12,
    ("image", 1024): 16,
    ("text", 512): 8,
    ("decoder", 512): 8,
}


class Inferred(NamedTuple):
    """A model by its sizes, and the assumptions in it, by tower."""

    model: config_lib.Model
    assumed: dict[str, list[str]]


def infer(
    states: Mapping[str, Mapping[str, np.ndarray]], heads: Mapping[str, int | None]
) -> Inferred:
    """The model that these state dicts are the parameters of.

    Args:
      states: {"backbone": ..., "decoder": ...}.
      heads: "image", "text", "decoder" -> heads, or None to read or assume them.

    Raises:
      ConvertError: an array that gives a size is missing or has another number of axes, or heads do not fit.
    """
    towers_, decoder = (Entries(states[module], rows) for module, rows in TABLES.items())
    sizes = {
        "image": towers.image_sizes(towers_)
        | dict(norm_eps=1e-6, block_init="torch", projection="matrix"),
        "text": towers.text_sizes(towers_) | dict(norm_eps=1e-5),
        "decoder": _decoder_sizes(decoder),
    }
    assumed: dict[str, list[str]] = {tower: [] for tower in TOWERS}
    faults = []
    for tower in TOWERS:
        width, stated = sizes[tower]["width"], None
        if tower == "image" and sizes["image"]["qk_norm"]:
            (of_head,) = towers_.shape("image/blocks/attention/query_norm/scale", 1)
            stated = width // of_head
        usual = REFERENCE_HEADS.get((tower, width), None if width % 64 else width // 64)
        try:
            sizes[tower]["heads"] = towers.settle_heads(
                tower, width, stated, towers.Settings(heads), assumed[tower], usual
            )
        except ConvertError as error:
            faults.append(str(error))
    raise_any(faults)
    # Norm epsilons and dropout are constants of the reference; the initialisers are not used.
    model = config_lib.Model(
        embed_dim=towers_.width("text_projection/kernel"),
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
        image=config_lib.ImageTower(**sizes["image"]),
        text=config_lib.TextTower(**sizes["text"]),
        decoder=config_lib.RegionDecoder(**sizes["decoder"]),
    )
    return Inferred(model, assumed)


def _decoder_sizes(there: Entries) -> dict:
    queries, width = there.shape("decoder/query_embed", 2)
    return dict(
        queries=queries - 1,
        width=width,
        depth=there.depth("decoder/blocks/norm_1/scale"),
        mlp_dim=there.shape("decoder/blocks/mlp/in/bias", 1)[0],
        dropout=0.1,
        qkv_init_gain=1.0,
        norm_eps=1e-5,
        unroll=1,
    )
