"""The losses: `total` adds them up, `streaming` contrasts over devices, `matching` and `boxes` pair queries with regions."""

from grain_jax.losses.total import (
    Layout,
    Losses,
    Mean,
    box_loss,
    image_caption_loss,
    layout,
    region_description_loss,
    total_loss,
)

__all__ = [
    "Layout",
    "Losses",
    "Mean",
    "box_loss",
    "image_caption_loss",
    "layout",
    "region_description_loss",
    "total_loss",
]
