"""The configuration of a run as frozen dataclasses: what keys there are (`fields`), `from_dict` (`parse`), and what
contradicts itself (`checks`).

Needs neither JAX nor ml_collections, so that a config can be checked anywhere.
"""

from grain_jax.config.checks import divisors, flags_of
from grain_jax.config.evals import Evaluator
from grain_jax.config.fields import (
    ACTIVATIONS,
    DTYPES,
    EITHER_OR,
    LAYER_MAPS,
    REMAT_POLICIES,
    BoxHead,
    Config,
    Dataset,
    ImageTower,
    Init,
    Input,
    Lora,
    Loss,
    Mesh,
    Model,
    Optim,
    RegionDecoder,
    Suite,
    Text,
    TextTower,
    Wandb,
)
from grain_jax.config.parse import (
    ConfigError,
    evaluator_from_dict,
    from_dict,
    loss_term,
    model_from_dict,
    suite_from_dict,
    to_json,
    unknown_key,
)
from grain_jax.config.values import flatten, select, without_defaults

__all__ = [
    "ACTIVATIONS",
    "BoxHead",
    "DTYPES",
    "EITHER_OR",
    "REMAT_POLICIES",
    "Config",
    "ConfigError",
    "Dataset",
    "Evaluator",
    "ImageTower",
    "Init",
    "Input",
    "LAYER_MAPS",
    "Lora",
    "Loss",
    "Mesh",
    "Model",
    "Optim",
    "RegionDecoder",
    "Suite",
    "Text",
    "TextTower",
    "Wandb",
    "divisors",
    "evaluator_from_dict",
    "flags_of",
    "flatten",
    "from_dict",
    "loss_term",
    "model_from_dict",
    "select",
    "suite_from_dict",
    "to_json",
    "unknown_key",
    "without_defaults",
]
