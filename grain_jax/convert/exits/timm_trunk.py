"""The model of timm that is an image tower with attention pooling: open_clip takes its trunks by name alone."""

import contextlib
import functools
from typing import Any

from grain_jax import config as config_lib
from grain_jax.convert.faults import ConvertError, needing

_NAMES = "vit_*siglip*"


@functools.lru_cache(maxsize=16)
def name_of(image: config_lib.ImageTower) -> str:
    """The name, such as vit_base_patch16_siglip_224: a search of seconds.

    Raises:
      ConvertError: timm is missing, or has no such model; one line.
    """
    with needing("timm", "model.image.pool: open_clip has map with a trunk of timm"):
        import timm
    import torch

    for name in timm.list_models(_NAMES):
        if f"patch{image.patch_size}_" not in name:
            continue
        with torch.device("meta"), contextlib.suppress(Exception):  # a name that timm cannot build
            if _fits(timm.create_model(name, pretrained=False, num_classes=0), image):
                return name
    raise ConvertError(
        f"model.image: got {image.image_size} px, patch {image.patch_size}, width {image.width}, depth {image.depth}, heads"
        f" {image.heads}, MLP {image.mlp_dim} {image.activation}, norm epsilon {image.norm_eps:g}; open_clip takes such"
        f" towers of timm by name, which has none of that kind ({_NAMES})"
    )


def _fits(trunk: Any, image: config_lib.ImageTower) -> bool:
    """Whether a trunk has the sizes, the pooling, the activation and the epsilon of a tower."""
    block, act = trunk.blocks[0], trunk.blocks[0].mlp.act
    is_tanh = getattr(act, "approximate", "") == "tanh" or "Tanh" in type(act).__name__
    theirs = (
        *(trunk.patch_embed.img_size[0], trunk.patch_embed.patch_size[0], trunk.embed_dim),
        *(len(trunk.blocks), block.attn.num_heads, block.mlp.fc1.out_features),
        *(trunk.global_pool, trunk.norm.eps, is_tanh),
    )
    ours = (
        *(image.image_size, image.patch_size, image.width),
        *(image.depth, image.heads, image.mlp_dim),
        *("map", image.norm_eps, image.activation == "gelu_tanh"),
    )
    return theirs == ours
