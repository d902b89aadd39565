"""GRAIN in JAX: contrastive pretraining that aligns image regions with descriptions.

`grain_jax.load("aviary-tiny")` returns a model that encodes images, texts and regions (see `inference.Predictor`); it
takes a folder of your own, too.
Importing this package loads neither JAX nor TensorFlow.
"""

import importlib.machinery
import sys
from pathlib import Path

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent


class _Beside:
    """Finds grain_jax.configs, .data and .launch in a checkout that is not installed: they lie beside this folder."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The spec of one of the three, or None; called by the import system."""
        if name in ("grain_jax.configs", "grain_jax.data", "grain_jax.launch"):
            return importlib.machinery.PathFinder.find_spec(name, [str(_CHECKOUT)])
        return None


if (_CHECKOUT / "setup.py").is_file():
    sys.meta_path.insert(
        0, _Beside
    )  # before the finder of an editable installation, which may be another checkout


def load(path, dtype="float32", **options):
    """The model of a folder or a name: "aviary-tiny", or "hf://ORG/NAME"; see `grain_jax.inference.load`."""
    from grain_jax import inference  # JAX takes a second to import; only those who load a model pay

    return inference.load(path, dtype, **options)
