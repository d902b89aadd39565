"""Inference: `load` returns a `Predictor`, which embeds images, texts and regions."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grain_jax.inference.inputs import InputError
    from grain_jax.inference.predictor import ClassFeatures, Grounding, Predictor, Tokens, load

__all__ = [
    "ClassFeatures",
    "Grounding",
    "InputError",
    "Predictor",
    "Tokens",
    "load",
]


def __getattr__(name: str) -> Any:
    """Imports its module, and with most of them JAX, when a public name is first used; `scores` and `prompts` need numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "inputs" if name == "InputError" else "predictor"
    return getattr(importlib.import_module(f"grain_jax.inference.{module}"), name)
