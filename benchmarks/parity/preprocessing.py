"""Our resize of images against the reference's (preprocess.npz): inputs, outputs and tolerances.

Used by the parity table and tests/input_pipeline/test_transforms.py; only `tf_distance` imports TensorFlow.
"""

import functools
from collections.abc import Iterator

import numpy as np
import PIL
import PIL.Image

from benchmarks.parity.comparison import Comparison, read_npz
from grain_jax.core import images

SIZE = 64  # of the outputs in the goldens

# Worst and mean distance to PIL, in levels of 255. PIL rounds to whole levels and clips between its two
# passes, which shows on noise and checkerboards.
TF_DISTANCE = {
    "checker_96x130": (12, 1.7),
    "noise_80x45": (17, 0.3),
    "palette_90x70": (16, 0.3),
    "rgb_37x53": (4, 0.25),
    "rgba_40x60": (3, 0.25),
    "gray_50x70": (2, 0.25),
    "rgb_65x63": (2, 0.25),
    "rgb_224x224": (1, 0.15),
    "rgb_300x200": (1, 0.15),
}  # 0 for all other images


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """The arrays of preprocess.npz."""
    return read_npz("preprocess.npz")


def names() -> list[str]:
    """Names of the images in the goldens."""
    return [key.removeprefix("input/") for key in golden() if key.startswith("input/")]


def image(name: str) -> PIL.Image.Image:
    """The input image of the reference."""
    pixels = golden()[f"input/{name}"]
    if name.startswith("palette"):
        out = PIL.Image.fromarray(pixels, "L").convert("P")
        out.putdata(pixels.reshape(-1).tolist())
        out.putpalette(golden()["palette"].astype(np.uint8).tobytes())
        return out
    return PIL.Image.fromarray(pixels)


def expected(name: str) -> np.ndarray:
    """The output of the reference, uint8 [64, 64, 3], for the installed Pillow."""
    # Pillow 13 has another order of the two passes for some shapes (quirk 20).
    older = f"pillow_10_1_0/resized_u8/{name}"
    new = int(PIL.__version__.split(".")[0]) >= 13
    return golden()[f"resized_u8/{name}" if new or older not in golden() else older]


def pil_distance(name: str) -> np.ndarray:
    """|our PIL path - the reference| in levels, int [64, 64, 3]."""
    # As the reference does: the conversion to RGB comes last.
    resized = image(name).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    ours = np.asarray(resized.convert("RGB"))
    return np.abs(ours.astype(int) - expected(name))


def tf_distance(name: str) -> np.ndarray:
    """|tf.data's path - our PIL path| in levels, int [64, 64, 3]. Raises ImportError without TensorFlow."""
    import tensorflow as tf

    from grain_jax.input_pipeline import transforms

    rgb = image(name).convert("RGB")
    ours = transforms.resize(tf.constant(np.asarray(rgb)), SIZE).numpy()
    if ours.dtype != np.uint8:
        raise ValueError(f"{name}: dtype {ours.dtype}, expected uint8")
    return np.abs(ours.astype(int) - images.resize(rgb, SIZE))


def preprocessing_pil() -> Iterator[Comparison]:
    """The PIL path (evaluation, `grain_jax.load`): the worst pixel of each image, in levels of 255."""
    for name in names():
        yield Comparison(name, float(pil_distance(name).max()), 0.0)


def preprocessing_tf() -> Iterator[Comparison]:
    """tf.data's path (training) against PIL's: worst and mean in levels; nothing without TensorFlow."""
    try:
        for name in names():
            distance = tf_distance(name)
            worst, mean = TF_DISTANCE.get(name, (0, 0))
            yield Comparison(f"{name} worst", float(distance.max()), float(worst))
            yield Comparison(f"{name} mean", float(distance.mean()), float(mean))
    except ImportError as error:
        if not (error.name or "").startswith("tensorflow"):
            raise
