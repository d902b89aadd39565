"""The model of timm that is an image tower with attention pooling: open_clip takes its trunks by name alone."""

from typing import Any

from grain_jax import config as config_lib
from grain_jax.convert import from_open_clip
from grain_jax.convert.faults import ConvertError, needing

SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}  # by width


def name_of(image: config_lib.ImageTower) -> str:
    """The name, such as vit_base_patch16_siglip_224.

    Raises:
      ConvertError: timm is missing, or has no such model; one line.
    """
    with needing("timm", "model.image.pool: open_clip has map with a trunk of timm"):
        import timm
        import torch
    size = SIZES.get(image.width, "none")
    name = f"vit_{size}_patch{image.patch_size}_siglip_{image.image_size}"
    if timm.is_model(name):
        with torch.device("meta"):
            trunk: Any = timm.create_model(name, pretrained=False, num_classes=0)
        fields = from_open_clip.timm_fields(trunk)
        del fields["patch_bias"]  # zeros stand in for none
        if all(getattr(image, key) == value for key, value in fields.items()):
            return name
    raise ConvertError(
        f"model.image: open_clip takes such towers of timm by name, and timm has no {name} of depth {image.depth}, {image.heads}"
        f" heads, MLP {image.mlp_dim} {image.activation} and norm epsilon {image.norm_eps:g}"
    )
