"""Checkpoints that hold more than two towers, or other names: FG-CLIP 1 and 2, TIPS v2.

Of FG-CLIP one text head is taken: that of short texts, of long texts, or (FG-CLIP 2) of boxes. Its long texts have
positions of their own, the first of one table and the others of a second one. What is not taken is named.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from grain_jax.convert.faults import ConvertError, raise_any

HEADS = ("short", "long", "box")
_POSITIONS = "text_model.embeddings.position_embedding"
_LONG = (f"{_POSITIONS}_ori.weight", f"{_POSITIONS}_res.weight")
# Text head -> the entries of its projection, without .weight and .bias; the first is where a CLIP or SigLIP has it.
_FG_CLIP_1 = {"short": "text_projection", "long": "text_filip_projection"}
_FG_CLIP_2 = {"short": "text_model.head", "long": "longtext_head", "box": "boxtext_head"}
_KEPT = 20  # long texts: positions of the first table
# What no head of ours needs: scales of other losses, and the head of patches.
_UNUSED = re.compile(
    r"logit_scale_(finegraind|hardneg)|dense_feature_head\.(probe|attention\.in_proj_(weight|bias)"
    r"|(attention\.out_proj|layernorm|mlp\.fc[12])\.(weight|bias))"
)
# transformers' name of the temperature in TIPS v2, and its value where a checkpoint has none.
_TEMPERATURE, _USUAL_TEMPERATURE = "temperature", 0.005065968260169029


class Taken(NamedTuple):
    """Two towers by the names of CLIP, SigLIP or TIPS v2."""

    state: dict[str, np.ndarray]
    config: Mapping[str, Any]  # config.json
    notes: tuple[str, ...] = ()  # for the report: what was chosen and left out


def take(state: dict[str, np.ndarray], config: Mapping[str, Any], head: str | None) -> Taken:
    """The two towers of a checkpoint, with the text head of that name (None: short).

    Raises:
      ConvertError: it has no such head, or arrays of the head are missing or do not fit.
    """
    if (config.get("model_type") or "").startswith("tipsv2"):
        taken = _tips(state, config)
    elif not any(name in state for name in _LONG):
        taken = Taken(state, config)
    else:
        return _fg_clip(state, config, head or "short")
    if head is not None:
        raise ConvertError(f"got the text head {head}, expected none: only FG-CLIP has several")
    return taken


def _fg_clip(state: dict[str, np.ndarray], config: Mapping[str, Any], head: str) -> Taken:
    heads = _FG_CLIP_2 if "text_model.head.weight" in state else _FG_CLIP_1
    if head not in heads:
        raise ConvertError(f"got the text head {head}, expected {' or '.join(heads)}")
    leaves = lambda name: {f"{name}.{leaf}" for leaf in ("weight", "bias")}
    left = {name for other in heads.values() if other != heads[head] for name in leaves(other)}
    left |= {f"{_POSITIONS}.weight"} if head == "long" else set(_LONG)
    left = {name for name in state if name in left or _UNUSED.fullmatch(name)}
    rest = {name: array for name, array in state.items() if name not in left}
    own, chosen = heads["short"], heads[head]
    if f"{chosen}.weight" not in rest:
        raise ConvertError(f"{chosen}.weight: missing, the text head {head}")
    for name, of_head in zip(sorted(leaves(own)), sorted(leaves(chosen))):
        if of_head in rest:
            rest[name] = rest.pop(of_head)
    if head == "long":
        config = _with_long_positions(rest, config)
    length = rest[f"{_POSITIONS}.weight"].shape[:1] if f"{_POSITIONS}.weight" in rest else ()
    chosen = f"text head {head}: {chosen}, {length[0] if length else 'no'} positions"
    return Taken(rest, config, (chosen, f"left out: {', '.join(sorted(left))}"))


def _with_long_positions(
    state: dict[str, np.ndarray], config: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Puts the positions of long texts into `state`, in place of their two tables; the config with their number."""
    raise_any([f"{name}: missing" for name in _LONG if name not in state])
    first, others = (state.pop(name) for name in _LONG)
    if first.ndim != 2 or first.shape != others.shape:
        raise ConvertError(
            f"{_LONG[0]}, {_LONG[1]}: got the shapes {first.shape} and {others.shape}, expected two equal ones of two axes"
        )
    cfg = config.get("text_config") or {}
    kept, stated = cfg.get("keep_len"), cfg.get("longtext_len")
    kept = _KEPT if kept is None else kept
    if stated not in (None, len(first)):
        raise ConvertError(
            f"text_config.longtext_len: got {stated}, but the arrays have {len(first)}"
        )
    state[f"{_POSITIONS}.weight"] = np.concatenate([first[:kept], others[kept:]])
    return {**config, "text_config": {**cfg, "max_position_embeddings": len(first)}}


def _tips(state: dict[str, np.ndarray], config: Mapping[str, Any]) -> Taken:
    """Its temperature as the logarithm of a scale, which every other family has; without the token of masked patches."""
    rest, notes = dict(state), []
    if "vision_encoder.mask_token" in rest:
        del rest["vision_encoder.mask_token"]
        notes.append("left out: vision_encoder.mask_token")
    if config["model_type"] != "tipsv2":  # a tower alone
        return Taken(rest, config, tuple(notes))
    temperature = rest.pop(_TEMPERATURE, None)
    if temperature is None:
        value = config.get("temperature_init_value") or _USUAL_TEMPERATURE
        notes.append(f"temperature {value:g}, of the config: the weights have none")
    elif temperature.size != 1 or not 0 < (value := float(temperature.reshape(()))) < math.inf:
        raise ConvertError(
            f"{_TEMPERATURE}: got {np.ravel(temperature)[:5].tolist()}, expected one number above 0"
        )
    rest["logit_scale"] = np.array(-math.log(value), np.float32)
    return Taken(rest, config, tuple(notes))
