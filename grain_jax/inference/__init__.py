"""Inference: `load` returns a `Predictor`, which embeds images, texts and regions."""

from grain_jax.inference.inputs import InputError, Tokens
from grain_jax.inference.predictor import ClassFeatures, Detections, Grounding, Predictor, load

__all__ = ["ClassFeatures", "Detections", "Grounding", "InputError", "Predictor", "Tokens", "load"]
