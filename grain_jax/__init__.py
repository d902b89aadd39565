"""GRAIN in JAX: contrastive pretraining that aligns image regions with descriptions.

`grain_jax.load("aviary-tiny")` returns a model of images, texts and regions (see `inference.Predictor`); it
takes a folder of your own, too.
Importing this package loads neither JAX nor TensorFlow.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from grain_jax.checkpoint import importers
from grain_jax.core.version import __version__ as __version__

# Before they are imported: both print lines that tell a user nothing. Decoding does not use oneDNN.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
_devices = "accel*", "vfio/*", "nvidia*", "kfd", "dxg"  # TPUs and GPUs on Linux
if importlib.util.find_spec("libtpu") and not any(any(Path("/dev").glob(x)) for x in _devices):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else JAX asks libtpu

if TYPE_CHECKING:
    from grain_jax.inference import load as load
else:

    def load(name, *, device=None, dtype=None, templates=None, progress=False):
        """The model of a folder or a name ("aviary-tiny", "hf://ORG/NAME"): `grain_jax.inference.load`."""
        from grain_jax import inference as lib  # those who load no model do not import JAX

        settings = dict(device=device, dtype=dtype, templates=templates, progress=progress)
        return lib.load(name, **settings)


def _import_weights(reference, folder):
    from grain_jax.convert import cache  # needed for weights of other libraries only

    return cache.import_weights(reference, folder)


importers.import_weights = _import_weights
