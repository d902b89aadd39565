"""The image towers with rotary positions, DINOv3 and PE-core: no array tells of these, so a name or the arrays around do."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from grain_jax.config import ImageTower
from grain_jax.convert import formats, towers
from grain_jax.convert.faults import ConvertError
from grain_jax.convert.open_clip.checkpoint import Checkpoint
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.convert.towers import Stated

Found = tuple[str, list[NamePair], Stated]  # prefix of the names, table, what the package states
_DINOV3, _PE_CORE = "DINOv3", "PE-core"
_NAMES = {_PE_CORE: r"vit_pe_core_\w+", _DINOV3: r"vit_\w+_dinov3\w*"}  # of timm
_POOL_HEADS = 8  # of every PE-core
_BIASES = tuple(f"image/blocks/attention/{name}/bias" for name in ("query", "value"))


def family_of_timm(name: str | None, state: Mapping[str, np.ndarray], prefix: str) -> str | None:
    """The family of a tower of timm, by its name or else by its arrays; None: neither of these."""
    if name is not None:
        name = name.partition(".")[0]
        return next((x for x, pattern in _NAMES.items() if re.fullmatch(pattern, name)), None)
    has = lambda entry: f"{prefix}{entry}" in state
    if has("norm_pre.weight") and has("attn_pool.latent"):
        return _PE_CORE
    is_dinov3 = has("reg_token") and has("blocks.0.gamma_1") and not has("pos_embed")
    return _DINOV3 if is_dinov3 and not has("blocks.0.attn.qkv.bias") else None


def of_timm(family: str, state: Mapping[str, np.ndarray], prefix: str, assumed: list[str]) -> Found:
    """A tower of that family in timm; adds lines to `assumed`."""
    if family == _DINOV3:
        gated = f"{prefix}blocks.0.mlp.fc1_g.weight" in state
        rows = formats.timm_dinov3(prefix, gated=gated)
        stated = _dinov3(Entries(state, rows))
        assumed.append("DINOv3: norm epsilon 1e-5, rotary positions of theta 100")
        return prefix, rows, stated._replace(activation="silu" if gated else "gelu")
    rows = formats.timm_pe_core(prefix)
    sizes = towers.image_sizes(Entries(state, rows))
    grid = sizes["image_size"] // sizes["patch_size"]
    assumed.append(
        f"PE-core: norm epsilon 1e-5, rotary positions of theta 10000 on {grid} x {grid} patches, {_POOL_HEADS} heads in"
        " the pool"
    )
    fields: dict[str, Any] = dict(
        rope="grid", rope_theta=1e4, rope_grid=grid, pool_heads=_POOL_HEADS
    )
    fields |= dict(zip(("pixel_mean", "pixel_std"), towers.SIGLIP_PIXELS))
    return prefix, rows, Stated(1e-5, "gelu", "gelu", pool="map", fields=fields)


def of_bare_timm(checkpoint: Checkpoint, assumed: list[str]) -> Found:
    """A file of timm alone.

    Raises:
      ConvertError: neither DINOv3 nor PE-core.
    """
    name = checkpoint.timm.get("architecture")
    family = family_of_timm(name, checkpoint.state, "")
    if family is None:
        got = f"got the architecture {name[:100]!r}" if name else "got a model of timm"
        raise ConvertError(f"{got}, expected vit_*_dinov3 or vit_pe_core_*, as timm names them")
    return of_timm(family, checkpoint.state, "", assumed)


def of_hugging_face(checkpoint: Checkpoint, assumed: list[str]) -> Found:
    """DINOv3 of transformers; adds a line to `assumed` where there is no config.json."""
    state, cfg = checkpoint.state, checkpoint.hf
    rows = formats.hf_dinov3("model." if "model.layer.0.norm1.weight" in state else "")
    stated = _dinov3(Entries(state, rows))
    if not cfg:
        assumed.append("DINOv3: norm epsilon 1e-5, rotary positions of theta 100")
        gated = "image/blocks/mlp/gate/kernel" in Entries(state, rows)
        return "", rows, stated._replace(fallback="silu" if gated else "gelu")
    theta = cfg.get("rope_theta") or stated.fields["rope_theta"]
    activation = cfg.get("hidden_act") or stated.fallback
    return (
        "",
        rows,
        stated._replace(
            norm_eps=cfg.get("layer_norm_eps") or stated.norm_eps,
            activation=towers.OUR_ACTIVATION.get(activation, activation),
            heads=cfg.get("num_attention_heads"),
            fields={**stated.fields, "rope_theta": float(theta)},
        ),
    )


def _dinov3(there: Entries) -> Stated:
    fields: dict[str, Any] = dict(rope="centres", rope_theta=100.0)
    fields |= dict(key_bias="image/blocks/attention/key/bias" in there)
    fields |= dict(pixel_mean=ImageTower.pixel_mean, pixel_std=ImageTower.pixel_std)
    absent = tuple(name for name in _BIASES if name not in there)  # of some of timm's: zeros
    return Stated(1e-5, "gelu", pool="class", fields=fields, zeros=absent)
