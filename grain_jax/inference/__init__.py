"""Inference: `load` returns a `Predictor`, which embeds images, texts and regions."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grain_jax.inference.inputs import InputError
    from grain_jax.inference.jitted import box_program, programs
    from grain_jax.inference.predictor import ClassFeatures, Grounding, Predictor, Tokens, load

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

_IN = {
    "InputError": "inputs",
    "box_program": "jitted",
    "programs": "jitted",
}  # the others: predictor


def __getattr__(name: str) -> Any:
    """Imports its module, and with most of them JAX, when a public name is first used; `scores` and `prompts` need numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        importlib.import_module(f"grain_jax.inference.{_IN.get(name, 'predictor')}"), name
    )
