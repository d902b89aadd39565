"""Heads and activations of a tower: by flag, from a config beside the weights, or assumed."""

from collections.abc import Mapping
from typing import Any

from grain_jax import config as config_lib
from grain_jax.convert.faults import ConvertError
from grain_jax.convert.open_clip.checkpoint import Checkpoint, group
from grain_jax.convert.towers import Settings, settled

_OURS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_HEAD_SIZES = {1152: 72, 1536: 96}  # of SigLIP's So400m and g-opt; all others have heads of 64


def our_activation(name: str) -> str:
    """Our name of an activation of Hugging Face."""
    return _OURS.get(name, name)


def settle_heads(
    which: str, width: int, stated: int | None, settings: Settings, assumed: list[str]
) -> int:
    """The number of heads of a tower; adds a line to `assumed` where the checkpoint does not state it.

    Raises:
      ConvertError: flag and checkpoint differ, or the heads do not divide the width.
    """
    heads = settled(f"{which} heads", settings.heads.get(which), stated)
    usual = max(width // _HEAD_SIZES.get(width, 64), 1)
    if heads is None:
        heads = usual
        assumed.append(f"{heads} heads; --{which}-heads says otherwise")
    elif stated is None and heads != usual:  # any divisor fits the arrays
        assumed.append(f"{heads} heads, as told; towers of width {width} have {usual} as a rule")
    if heads < 1 or width % heads:
        raise ConvertError(f"{which} heads: got {heads}, expected a divisor of the width {width}")
    return heads


def settle_activation(
    which: str, stated: str | None, fallback: str, settings: Settings, assumed: list[str]
) -> str:
    """The activation of a tower; adds a line to `assumed` where the checkpoint does not state it.

    Raises:
      ConvertError: flag and checkpoint differ, or the model has no such activation.
    """
    stated = None if stated is None else our_activation(stated)
    activation = settled(f"{which} activation", settings.activation.get(which), stated)
    if activation is None:
        activation = fallback
        assumed.append(f"activation {fallback}; --{which}-activation says otherwise")
    elif stated is None and activation != fallback:
        assumed.append(f"activation {activation}, as told; such towers have {fallback} as a rule")
    if activation not in config_lib.ACTIVATIONS:
        raise ConvertError(
            f"{which} activation: got {activation!r}, expected one of"
            f" {', '.join(config_lib.ACTIVATIONS)}"
        )
    return activation


def stated_by_open_clip(checkpoint: Checkpoint, tower_cfg: Mapping[str, Any]) -> str | None:
    """The activation of open_clip's own tower by open_clip_config.json, or OpenAI's; else None."""
    if checkpoint.openai or checkpoint.open_clip.get("quick_gelu"):
        return "quick_gelu"
    if not checkpoint.open_clip:
        return None
    tanh = group(tower_cfg, "act_kwargs").get("approximate") == "tanh"
    return "gelu_tanh" if tanh else "gelu"


def hf_config(checkpoint: Checkpoint, which: str) -> Mapping[str, Any] | None:
    """The part of config.json about a tower; None without a config.json.

    A config.json leaves out values that equal the defaults of its class, maybe the whole part.
    """
    if (checkpoint.hf.get("model_type") or "").endswith(f"_{which}_model"):
        return checkpoint.hf  # of a single tower
    return group(checkpoint.hf, f"{which}_config") if checkpoint.hf else None
