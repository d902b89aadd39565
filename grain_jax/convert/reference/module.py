"""The torch module of a model (`hf_files/modeling_grain.py`) as the other side of the parity."""

import dataclasses
from typing import Any

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import parity
from grain_jax.convert.reference import names
from grain_jax.convert.reference.names import StateDicts


def make_module(model: config_lib.Model) -> Any:
    """The torch module of a model, in eval mode, with random weights.

    Raises:
      ImportError: torch or transformers is missing.
    """
    from grain_jax.convert.hf_files import configuration_grain, modeling_grain

    config = configuration_grain.GrainConfig(towers=dataclasses.asdict(model))
    return modeling_grain.GrainModel(config).eval()


def load_states(module: Any, states: StateDicts) -> None:
    """Loads the reference's state dicts into the torch module, strictly except for its unused entries."""
    import torch

    module.load_state_dict(
        {
            f"{part}.{name}": torch.tensor(array)
            for part, state in states.items()
            for name, array in state.items()
            if name not in names.UNUSED.get(part, ())
        }
    )


def outputs(model: config_lib.Model, params: Any, inputs: parity.Inputs) -> dict[str, np.ndarray]:
    """`parity.outputs`, and the scale (and bias) of the logits, of our model."""
    out = parity.outputs(model, params, inputs) | {"logit_scale": np.exp(params["logit_scale"])}
    return out | {name: params[name] for name in ("logit_bias",) if name in params}


def run_module(module: Any, inputs: parity.Inputs) -> dict[str, np.ndarray]:
    """The same outputs of the torch module."""
    import torch

    with torch.no_grad():
        pixels = torch.tensor(inputs.images).permute(0, 3, 1, 2)
        unit = torch.nn.functional.normalize
        texts = module.get_text_features(torch.tensor(inputs.token_ids).long())
        out = dict(
            image_embed=unit(module.get_image_features(pixels), dim=-1),
            text_embed=unit(texts, dim=-1),
            logit_scale=module.backbone.logit_scale.exp(),
        )
        decoder = module.config.towers["decoder"]
        if decoder is not None and decoder["queries"]:
            regions = module.get_regions(pixels)
            out |= dict(region_embed=regions.embeds, boxes_xyxy=regions.boxes_xyxy)
        if module.decoder.boxes is not None:
            boxes = torch.tensor(parity.BOXES).expand(len(pixels), -1, -1)
            out["box_embed"] = module.get_boxes(pixels, boxes)
        if module.backbone.logit_bias is not None:
            out["logit_bias"] = module.backbone.logit_bias
    return {name: value.detach().numpy() for name, value in out.items()}


def prove(model: config_lib.Model, params: Any, states: StateDicts) -> parity.Report:
    """Compares our model with `params` and the torch module with `states`, the arrays of the file."""
    try:
        module = make_module(model)
    except ImportError as error:
        return parity.not_proven(f"{error}; pip install 'grain_jax[interop]'")
    load_states(module, states)
    return prove_module(model, params, module)


def prove_module(model: config_lib.Model, params: Any, module: Any) -> parity.Report:
    """Compares our model with `params` and the torch module with its weights."""
    inputs = parity.inputs_of(model)
    comparisons = parity.compare(outputs(model, params, inputs), run_module(module, inputs))
    return parity.report(comparisons, f"the torch module, {torch_versions()}", inputs)


def torch_versions() -> str:
    """Versions of the packages that run the torch module, for reports."""
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"
