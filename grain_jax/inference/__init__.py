"""Inference: `load` returns a `Predictor`, which embeds images, texts and regions."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grain_jax.inference.predictor import (
        ClassFeatures,
        Grounding,
        InputError,
        Predictor,
        Tokens,
        box_program,
        load,
        programs,
    )

__all__ = [
    "ClassFeatures",
    "Grounding",
    "InputError",
    "Predictor",
    "Tokens",
    "box_program",
    "load",
    "programs",
]


def __getattr__(name: str) -> Any:
    """Imports `predictor`, and with it JAX, when a public name is first used; `scores` and `prompts` need numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("grain_jax.inference.predictor"), name)
