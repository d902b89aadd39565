"""GRAIN in JAX: contrastive pretraining that aligns image regions with descriptions.

`grain_jax.load("aviary-tiny")` returns a model that encodes images, texts and regions (see `inference.Predictor`); it
takes a folder of your own, too.
Importing this package loads neither JAX nor TensorFlow.
"""

from pathlib import Path

from grain_jax.checkpoint import importers
from grain_jax.core.version import __version__ as __version__

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file():
    # grain_jax.configs, .data and .launch lie beside this folder; in a wheel they lie in it.
    __path__.append(str(_checkout))


def load(path, dtype="float32", **options):
    """The model of a folder or a name: "aviary-tiny", or "hf://ORG/NAME"; see `grain_jax.inference.load`."""
    from grain_jax import inference  # JAX takes a second to import; only those who load a model pay

    return inference.load(path, dtype, **options)


def _import_weights(reference, folder):
    from grain_jax.convert import cache  # needed for weights of other libraries only

    return cache.import_weights(reference, folder)


importers.import_weights = _import_weights
