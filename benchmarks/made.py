"""The data of the comparison: JPEGs of noise with the spectrum of photographs, captions, regions, records."""

import functools
import json
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from benchmarks import harness
from grain_jax import config as config_lib
from grain_jax.core import ahead
from grain_jax.data import build

SIZE = 224
HEIGHT, WIDTH = 375, 500  # of the JPEGs
QUALITY = 80  # of the JPEGs: 55 KB each
WORKERS = 2
BATCH = 64
SETS = {  # name: arguments of data.build
    "full_size": ("--encoding=original",),
    "jpeg_224": ("--encoding=jpeg:95", f"--store-size={SIZE}"),
    "png_224": ("--encoding=png", f"--store-size={SIZE}"),
}
WORDS = (
    "a the of with and on in small large red green blue yellow bright dark long short round curved"
    " wing beak tail feather bird dog car tree house window street river stone wooden metal striped"
    " spotted smooth shiny old new standing sitting flying near under beside between"
    " two three morning evening water grass photo close view"
).split()


def image(number: int) -> PIL.Image.Image:
    """Noise whose amplitude falls with frequency as 1/f^1.25, in correlated colours."""
    rng = np.random.default_rng(number)
    shape = (384, 512)  # fast for the FFT; the image is a crop
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None] * shape[0], np.arange(shape[1] // 2 + 1))
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape), np.float32))
    fields = np.fft.irfft2(frequency**-1.25 * phases, shape)[:, :HEIGHT, :WIDTH]
    grey, red, blue = fields / fields.std(axis=(1, 2), keepdims=True)
    pixels = 118 + 50 * np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], axis=-1)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def annotation(number: int) -> dict[str, Any]:
    """A line of A.jsonl: captions of 8-18 words, 0-5 regions of 2-10."""
    rng = np.random.default_rng((1, number))
    sides = (WIDTH, HEIGHT)
    text = lambda least, most: " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))
    corner = rng.uniform(0, 0.5, (5, 2)) * sides
    extent = rng.uniform(0.1, 0.5, (5, 2)) * sides
    boxes = np.concatenate([corner, corner + extent], axis=1).tolist()
    return {
        "image": f"{number:06d}.jpg",
        "caption": text(8, 18),
        "synthetic_caption": text(8, 18),
        "regions": [
            {"box": box, "description": text(2, 10), "score": float(rng.uniform(0.3, 1))}
            for box in boxes[: rng.integers(0, 6)]
        ],
    }


def _save_image(number: int, folder: str) -> None:
    with (epath.Path(folder) / f"{number:06d}.jpg").open("wb") as file:
        image(number).save(file, "JPEG", quality=QUALITY)


def make(folder: epath.Path, count: int) -> None:
    """Makes the images, `A.jsonl` and the records of all SETS in `folder`."""
    images, annotations = folder / "images", folder / "A.jsonl"
    images.mkdir(parents=True)
    save = functools.partial(_save_image, folder=str(images))
    for _ in ahead.in_processes(save, range(count), WORKERS):
        pass
    lines = (annotation(number) for number in range(count))
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--annotations={annotations}", f"--images={images}", "--num-shards=16"]
    flags += [f"--output={folder / 'records'}"]
    for name, more in SETS.items():
        if status := build.main([*flags, f"--name={name}", *more]):
            raise RuntimeError(f"data.build {name} ended with {status}")


def config(folder: epath.PathLike, name: str) -> config_lib.Config:
    """The recipe on one of the sets."""
    keys = {"batch_size": BATCH, "text.pack_group": 16, "text.pack_rows": 10, "input.lanes": 4}
    records = str(epath.Path(folder) / "records")
    return harness.config("B/16", keys | {"input.data_dir": records, "input.name": name})
