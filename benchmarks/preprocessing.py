"""Our resize of images against the reference's (preprocess.npz): its inputs, outputs and tolerances.

Shared by the parity table and tests/input_pipeline/test_transforms.py; TensorFlow is imported by `tf_distance` alone.
"""

import functools

import numpy as np
import PIL
import PIL.Image
from etils import epath

from grain_jax.files import images

GOLDENS = epath.Path(__file__).absolute().parent.parent / "tests" / "goldens"
SIZE = 64  # of the goldens' outputs

# Worst and mean distance in levels of 255 from PIL's. PIL rounds to whole levels and clips between
# its two passes, which shows on noise and checkerboards.
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
}  # elsewhere 0


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """The arrays of preprocess.npz."""
    with (GOLDENS / "preprocess.npz").open("rb") as file, np.load(file) as stored:
        return dict(stored)


def names() -> list[str]:
    """The goldens' images."""
    return [key.removeprefix("input/") for key in golden() if key.startswith("input/")]


def picture(name: str) -> PIL.Image.Image:
    """The image as the reference got it."""
    pixels = golden()[f"input/{name}"]
    if name.startswith("palette"):
        out = PIL.Image.fromarray(pixels, "L").convert("P")
        out.putdata(pixels.reshape(-1).tolist())
        out.putpalette(golden()["palette"].astype(np.uint8).tobytes())
        return out
    return PIL.Image.fromarray(pixels)


def expected(name: str) -> np.ndarray:
    """What the reference makes of it, uint8 [64, 64, 3], with the Pillow that is installed."""
    # Pillow 13 orders the two passes otherwise on some shapes (quirk 20).
    older = f"pillow_10_1_0/resized_u8/{name}"
    new = int(PIL.__version__.split(".")[0]) >= 13
    return golden()[f"resized_u8/{name}" if new or older not in golden() else older]


def pil_distance(name: str) -> np.ndarray:
    """|our PIL path - the reference| in levels, int [64, 64, 3]."""
    ours = images.resize(picture(name), SIZE, convert_first=False)
    return np.abs(ours.astype(int) - expected(name))


def tf_distance(name: str) -> np.ndarray:
    """|tf.data's path - our PIL path| in levels, int [64, 64, 3]. Raises ImportError without TensorFlow."""
    import tensorflow as tf

    from grain_jax.input_pipeline import transforms

    rgb = picture(name).convert("RGB")
    ours = transforms.resize(tf.constant(np.asarray(rgb)), SIZE).numpy()
    if ours.dtype != np.uint8:
        raise ValueError(f"{name}: dtype {ours.dtype}, expected uint8")
    return np.abs(ours.astype(int) - images.resize(rgb, SIZE))
