"""The torch module of a model (`hf_files/modeling_grain.py`) as the other side of the parity."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import parity, text_decoder
from grain_jax.convert.reference import names
from grain_jax.convert.reference.names import StateDicts
from grain_jax.core import schema
from grain_jax.runtime.saved_model import StoredDecoder


def make_module(
    model: config_lib.Model,
    losses: Mapping[str, Any] | None = None,
    decoder: StoredDecoder | None = None,
) -> Any:
    """The torch module of a model, in eval mode, with random weights; with a text decoder of the sizes of `decoder`.

    Raises:
      ImportError: torch or transformers is missing.
    """
    from grain_jax.convert.hf_files import configuration_grain, modeling_grain

    sizes = None if decoder is None else text_decoder.stored_sizes(decoder, model, None)
    towers = dataclasses.asdict(model)
    config = configuration_grain.GrainConfig(towers=towers, losses=losses, text_decoder=sizes)
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


def outputs(
    model: config_lib.Model,
    params: Any,
    given: parity.Inputs,
    decoder: StoredDecoder | None = None,
) -> dict[str, np.ndarray]:
    """`parity.outputs`, and the scale (and bias) of the logits, of our model; of its text decoder the logits."""
    out = parity.outputs(model, params, given) | {"logit_scale": np.exp(params["logit_scale"])}
    if decoder is not None:
        tokens = text_decoder.sequences(decoder, model, given.count)
        out["text_decoder"] = text_decoder.logits(decoder, model, params, given.images, tokens)
    return out | {name: params[name] for name in ("logit_bias",) if name in params}


def run_module(
    module: Any, given: parity.Inputs, sequences: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The same outputs of the torch module; `sequences` are those of `text_decoder.sequences`."""
    import torch

    with torch.no_grad():
        shaped = {}
        if isinstance(given.images, schema.Patches):
            pixels, shapes = map(torch.from_numpy, given.images)
            shaped = {"spatial_shapes": shapes}
        else:
            pixels = torch.tensor(given.images).permute(0, 3, 1, 2)
        unit = torch.nn.functional.normalize
        out = dict(
            image_embed=unit(module.get_image_features(pixels, **shaped), dim=-1),
            text_embed=unit(module.get_text_features(torch.tensor(given.token_ids).long()), dim=-1),
            logit_scale=module.backbone.logit_scale.exp(),
        )
        decoder = module.config.towers["decoder"]
        if decoder is not None and decoder["queries"]:
            regions = module.get_regions(pixels, **shaped)
            out |= dict(region_embed=regions.embeds, boxes_xyxy=regions.boxes_xyxy)
        if module.decoder.boxes is not None:
            boxes = torch.tensor(parity.BOXES).expand(len(pixels), -1, -1)
            out["box_embed"] = module.get_boxes(pixels, boxes, **shaped)
        if sequences is not None:
            asked = torch.tensor(sequences).long()
            out["text_decoder"] = module.next_logits(pixels, asked, **shaped)
        if module.backbone.logit_bias is not None:
            out["logit_bias"] = module.backbone.logit_bias
    return {name: value.detach().numpy() for name, value in out.items()}


def prove(
    model: config_lib.Model,
    params: Any,
    states: StateDicts,
    decoder: StoredDecoder | None = None,
    lengths: tuple[int, ...] = (),
) -> parity.Report:
    """Compares our model with `params` and the torch module with `states`, the arrays of the file."""
    try:
        module = make_module(model, decoder=decoder)
    except ImportError as error:
        return parity.not_proven(params, f"{error}; pip install 'grain_jax[interop]'")
    load_states(module, states)
    given = parity.inputs_of(model, lengths)
    sequences = text_decoder.sequences(decoder, model, given.count)
    ours = outputs(model, params, given, decoder)
    found = parity.compare(ours, run_module(module, given, sequences))
    return parity.report(found, f"the torch module, {torch_versions()}", given)


def torch_versions() -> str:
    """Versions of the packages that run the torch module, for reports."""
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"
