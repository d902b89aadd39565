"""GRAIN in JAX: contrastive pretraining that aligns image regions with descriptions.

`grain_jax.load("DIR")` returns a model that encodes images, texts and regions (see `inference.Predictor`).
Importing this package loads neither JAX nor TensorFlow.
"""

__version__ = "0.1.0"


def load(path, dtype="float32", **options):
    """The model in a training workdir, a checkpoint or a converted folder; see `grain_jax.inference.load`."""
    from grain_jax import inference  # JAX takes a second to import; only those who load a model pay

    return inference.load(path, dtype, **options)
