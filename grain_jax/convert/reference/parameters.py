"""Parameters of the PyTorch reference's state dicts as ours, and back."""

from typing import Any

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import layouts
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.convert.reference import names
from grain_jax.convert.reference.checkpoint import StateDict
from grain_jax.convert.reference.sizes import MAX_LAYERS, sizes_of


def to_params(backbone: StateDict, decoder: StateDict, model: config_lib.Model) -> dict:
    """The reference's state dicts as our parameters, a nested dict of float32 arrays.

    Raises:
      ConvertError: unknown or missing keys, other shapes, values that are not finite; a line each.
    """
    states = {"backbone": backbone, "decoder": decoder}
    sizes = sizes_of(model)
    faults = [
        f"{tower}: got {of_tower['layers']} layers, expected at most {MAX_LAYERS}"
        for tower, of_tower in sizes.items()
        if of_tower["layers"] > MAX_LAYERS
    ]
    raise_any(faults)
    expected: dict[str, set[str]] = {m: set(unused) for m, unused in names.UNUSED.items()}
    params: dict = {}
    for tower, module, rows in names.TABLES:
        for row in rows:
            if not names.is_in(row, model):
                continue
            shape = names.shape_of(row, sizes[tower])
            layers = range(sizes[tower]["layers"]) if "{}" in row.theirs else (None,)
            parts = []
            for name in (row.theirs.format(i) for i in layers):
                array = states[module].get(name)
                fault = _fault_of(array, shape)
                if fault and name not in expected[module]:
                    faults.append(f"{module} {name}: {fault}")
                elif array is not None and not faults:
                    array = np.asarray(array, np.float32)
                    parts.append(names.to_ours(row, array, sizes[tower]))
                expected[module].add(name)
            if not faults:
                stacked = np.stack(parts) if "{}" in row.theirs else parts[0]
                layouts.put(params, row.ours, stacked)
    for module, state in states.items():
        for name in sorted(state.keys() - expected[module]):
            faults.append(f"{module} {name}: unknown key, shape {state[name].shape}")
    raise_any(faults)
    return params


def _fault_of(array: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    if array is None:
        return "missing"
    if array.shape != shape:
        return f"got shape {array.shape}, expected {shape}"
    return None if np.isfinite(array).all() else "holds values that are not finite"


_ONLY_OURS = ("decoder.image_pool", "boxes.kind")


def to_states(model: config_lib.Model, params: Any) -> dict[str, StateDict]:
    """Our parameters as the reference's two state dicts, with zeros for its unused entries.

    Args:
      model: the sizes.
      params: nested dict, as `GRAIN.init` gives.

    Raises:
      ConvertError: the reference cannot express the model; a line for each reason.
    """
    if model.decoder is None:
        raise ConvertError("model.decoder: got none; the reference's models have one")
    image, text = model.image, model.text
    faults = []
    for name, got, expected in (
        ("logit_bias_init", model.logit_bias_init, None),
        ("image.tower", image.tower, "vit"),
        ("text.tower", text.tower, "transformer"),
        ("image.norm_eps", image.norm_eps, 1e-6),
        ("image.class_token", image.class_token, True),
        ("image.patch_bias", image.patch_bias, True),
        ("image.pre_norm", image.pre_norm, False),
        ("image.activation", image.activation, "gelu"),
        ("image.pixel_mean", image.pixel_mean, config_lib.ImageTower.pixel_mean),
        ("image.pixel_std", image.pixel_std, config_lib.ImageTower.pixel_std),
        ("text.norm_eps", text.norm_eps, 1e-5),
        ("text.causal", text.causal, True),
        ("text.activation", text.activation, "quick_gelu"),
        ("text.pool", text.pool, "end"),
        ("text.projection", text.projection, "matrix"),
        ("text.tokenizer", text.tokenizer, "clip"),
        ("decoder.norm_eps", model.decoder.norm_eps, 1e-5),
        ("decoder.image_pool", model.decoder.image_pool, "query"),
        ("boxes.kind", model.boxes.kind, "none"),
    ):
        if got != expected:
            has = "; grain-jax convert to-hf writes it" if name in _ONLY_OURS else ""
            faults.append(f"model.{name}: got {got}, the reference's model has {expected}{has}")
    if model.decoder.queries == 0:
        faults.append(
            "model.decoder.queries: got 0, expected at least 1; without queries the reference's model has other parameters"
        )
    raise_any(faults)
    sizes = sizes_of(model)
    used, unused = names.state_dicts(params, sizes), names.unused(sizes)
    return {module: used[module] | unused[module] for module in used}
