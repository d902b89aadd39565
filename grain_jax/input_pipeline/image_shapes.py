"""Whether images should keep their own shape: what `grain-jax inspect` recommends and `derived` chooses.

A square distorts an image by the ratio of its sides. Where many images are longer than 5:4, own shapes are taken, with
as many patches as the square has, so that a step costs the same. Needs neither JAX nor TensorFlow.
"""

import numpy as np

LONG = 1.25  # longer side / shorter side, beyond which an image counts as long
MANY = 0.1  # share of long images from which on own shapes are taken
IMAGES = 1024  # of a sample


def share_of_long(sizes: np.ndarray) -> float:
    """The share of images [n, 2], height and width, n >= 1, whose sides differ by more than LONG."""
    sides = np.sort(np.asarray(sizes, np.float64), axis=1)
    return float((sides[:, 1] > LONG * sides[:, 0]).mean())


def keep_shape(long: float) -> bool:
    """Whether images should keep their shape, of which that share is long."""
    return long >= MANY
