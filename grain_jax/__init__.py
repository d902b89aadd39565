"""GRAIN in JAX: contrastive pretraining that aligns image regions with descriptions.

`grain_jax.load("aviary-tiny")` returns a model that encodes images, texts and regions (see `inference.Predictor`); it
takes a folder of your own, too.
Importing this package loads neither JAX nor TensorFlow.
"""

from typing import TYPE_CHECKING

from grain_jax.checkpoint import importers
from grain_jax.core.version import __version__ as __version__

if TYPE_CHECKING:
    from grain_jax.inference import load as load
else:

    def load(name, *, device=None, dtype=None, templates=None, progress=False):
        """The model of a folder or a name: "aviary-tiny", or "hf://ORG/NAME"; see `grain_jax.inference.load`."""
        from grain_jax import (
            inference,
        )  # JAX takes a second to import; only those who load a model pay

        settings = dict(device=device, dtype=dtype, templates=templates, progress=progress)
        return inference.load(name, **settings)


def _import_weights(reference, folder):
    from grain_jax.convert import cache  # needed for weights of other libraries only

    return cache.import_weights(reference, folder)


importers.import_weights = _import_weights
