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


def prove(model: config_lib.Model, params: Any, states: StateDicts) -> parity.Report:
    """Compares our model with `params` and the torch module with `states`, the arrays of the file."""

    def run(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        module = make_module(model)
        load_states(module, states)
        return parity.clip_outputs(module, inputs)

    return parity.prove(model, params, "the torch module", ("transformers", "torch"), run)
