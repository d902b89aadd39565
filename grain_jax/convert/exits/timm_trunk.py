"""The model of timm that is an image tower with attention pooling: open_clip takes its trunks by name alone."""

import contextlib
import functools
from typing import Any

from grain_jax import config as config_lib
from grain_jax.convert.faults import ConvertError, needing

_NAMES = "vit_*siglip*"


def name_of(image: config_lib.ImageTower) -> str:
    """The name, such as vit_base_patch16_siglip_224.

    Raises:
      ConvertError: timm is missing, or has no such model; one line.
    """
    with needing("timm", "model.image.pool: open_clip has map with a trunk of timm"):
        import timm  # noqa: F401
    if name := _find(image):
        return name
    raise ConvertError(
        f"model.image: got {image.image_size} px, patch {image.patch_size}, width {image.width}, depth {image.depth}, heads"
        f" {image.heads}, MLP {image.mlp_dim} {image.activation}, norm epsilon {image.norm_eps:g}; open_clip takes such"
        f" towers of timm by name, which has none of that kind ({_NAMES})"
    )


@functools.lru_cache(maxsize=16)
def _find(image: config_lib.ImageTower) -> str | None:
    """The name, or None: a search of seconds."""
    import timm
    import torch

    wanted = (image.image_size, image.patch_size, image.width, image.depth, image.heads)
    for name in timm.list_models(_NAMES):
        if f"patch{image.patch_size}_" not in name:
            continue
        with torch.device("meta"), contextlib.suppress(Exception):  # a name that timm cannot build
            trunk: Any = timm.create_model(name, pretrained=False, num_classes=0)
            if _sizes(trunk) == (*wanted, image.mlp_dim) and _has_habits(trunk, image):
                return name
    return None


def _sizes(trunk: Any) -> tuple[int, ...]:
    block, patches = trunk.blocks[0], trunk.patch_embed
    sizes = trunk.embed_dim, len(trunk.blocks), block.attn.num_heads, block.mlp.fc1.out_features
    return (patches.img_size[0], patches.proj.weight.shape[-1], *sizes)


def _has_habits(trunk: Any, image: config_lib.ImageTower) -> bool:
    """Whether what the sizes do not tell is that of the tower."""
    import torch

    first = lambda module: {name.partition(".")[0] for name, _ in module.named_parameters()}
    act = trunk.blocks[0].mlp.act
    is_tanh = getattr(act, "approximate", "") == "tanh" or "Tanh" in type(act).__name__
    return (
        trunk.global_pool == "map"
        and isinstance(trunk.norm, torch.nn.LayerNorm)
        and abs(trunk.norm.eps - image.norm_eps) < 1e-12
        and "GELU" in type(act).__name__.upper()
        and is_tanh == (image.activation == "gelu_tanh")
        and first(trunk) == {"patch_embed", "pos_embed", "blocks", "norm", "attn_pool"}
        and first(trunk.blocks[0]) == {"norm1", "attn", "norm2", "mlp"}
    )
