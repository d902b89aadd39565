"""What config files share: the defaults of config/fields.py as a ConfigDict, and the sizes of the towers.

A config file starts from `base` and changes what differs. It may lie anywhere: this package imports
ml_collections alone, no JAX.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from grain_jax.config import fields, model_fields
from grain_jax.config.keys import keys_of

Keys = Any  # a ConfigDict, whose keys are attributes that type checkers do not know

# What differs from B/16. S/16, B/16 and L/14 are the reference's sizes (clip/custom_models.py): S/16 has 12
# heads of 32, not timm's 6 of 64; L/14 keeps the text tower of width 512. H/14 and g/14 have the towers and
# the joint space of OpenCLIP's ViT-H-14 and ViT-g-14 (open_clip/model_configs), with heads of 80 and 88.
_LARGE_TEXT = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
SIZES = {
    "tiny": dict(
        embed_dim=64,
        image=dict(image_size=64, patch_size=8, width=96, depth=3, heads=4, mlp_dim=384, unroll=3),
        text=dict(width=96, depth=2, heads=4, mlp_dim=384, unroll=2),
        decoder=dict(width=96, depth=2, heads=4, mlp_dim=384, unroll=2),
    ),
    "S/16": dict(image=dict(width=384, mlp_dim=1536)),
    "B/16": {},
    "L/14": dict(image=dict(patch_size=14, width=1024, depth=24, heads=16, mlp_dim=4096)),
    "H/14": dict(
        embed_dim=1024,
        image=dict(patch_size=14, width=1280, depth=32, heads=16, mlp_dim=5120),
        text=_LARGE_TEXT,
    ),
    "g/14": dict(
        embed_dim=1024,
        image=dict(patch_size=14, width=1408, depth=40, heads=16, mlp_dim=6144),
        text=_LARGE_TEXT,
    ),
}


def defaults(cls: type) -> Keys:
    """The keys of a group with their defaults; those without a default are left out.

    A key whose default is None is a placeholder, so that the command line can set it.
    """
    c = ConfigDict()
    for name, key in keys_of(cls).items():
        if key.default is None:
            c[name] = placeholder(key.required_kind)
        elif dataclasses.is_dataclass(key.default):
            c[name] = defaults(type(key.default))
        elif key.default is not dataclasses.MISSING:
            c[name] = ConfigDict() if key.is_entries else key.default
    return c


def model(size: str = "B/16") -> Keys:
    """The model of that size: one of tiny, S/16, B/16, L/14, H/14, g/14."""
    if size not in SIZES:
        raise ValueError(f"model size: got {size!r}, expected one of {', '.join(SIZES)}")
    c = defaults(model_fields.Model)
    c.update(SIZES[size])
    return c


def on_hardware(c: Keys, table: dict[str, dict], name: str | None) -> Keys:
    """`c` with the overrides that `table` has for that hardware; None: unchanged."""
    if name is not None:
        if name not in table:
            raise ValueError(f"hardware: got {name!r}, expected one of {', '.join(table)}")
        c.update_from_flattened_dict(table[name])
    return c


def base(size: str = "B/16") -> Keys:
    """The recipe of the paper (docs/method.md, Training recipe), without a dataset and a length."""
    c = defaults(fields.Config)
    c.model = model(size)
    return c


def with_pointer(c: Keys) -> Keys:
    """`c` with what docs/claim.md recommends for photographs.

    Queries point at patches and read the box head; the boxes of all patches are the regions. Regions whose
    box and text disagree count less, since detectors wrote them.
    """
    c.model.decoder.update(boxes="pointer", reads_box=True, class_score="best")
    c.model.boxes.update(kind="roi_align", bins=3, proposals=True)
    c.loss.update(box=0.2, deep_supervision=True, box_description=1.0, agreement=True)
    return c


def without_decoder(c: Keys) -> Keys:
    """`c` from `with_pointer` as two towers: regions are boxes of patches, which the box head embeds."""
    c.model.decoder, c.model.image.pool = None, "map"
    c.loss.update(region_description=0.0, deep_supervision=False)
    return c


def reference_behaviour(c: Keys) -> Keys:
    """`c` with the behaviour of the PyTorch reference (docs/method.md, Where it differs), for comparisons."""
    c.text.packing = False
    c.loss.group_size = 128
    c.loss.mask_duplicates = False
    c.loss.box = 1.5
    c.model.image.block_init = "torch"
    c.reference = True
    return c
