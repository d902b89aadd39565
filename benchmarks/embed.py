"""Images a second of `grain-jax embed` beside the model alone, and its peak memory at two numbers of images.

    python -m benchmarks.embed [--images 2000 20000] [--size B/16 | --checkpoint M] [--turns 3] [--json OUT.json]

The whole command runs on folders of JPEGs of that many images, a process each, in turns; the images are hard links to
500 different ones. Its speed is that of the images which the second folder has more, so that the start does not count.
The model alone encodes images, decoded and resized before, in batches of the same size. The ratio of both is what
reading and writing cost.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, made, random_weights, stopwatch

DIFFERENT = 500  # images
ALONE = 1024  # images that the model alone encodes


def make_images(folder: Path, count: int, pixels: int | None) -> Path:
    """A folder with `count` JPEGs of 500 x 375, or resized to `pixels` a side: links to DIFFERENT ones."""
    originals = folder.parent / "different"
    originals.mkdir(exist_ok=True)
    folder.mkdir()
    for number in range(count):
        original = originals / f"{number % DIFFERENT:05d}.jpg"
        if not original.exists():
            image = made.image(number % DIFFERENT)
            image = image.resize((pixels, pixels)) if pixels else image
            image.save(original, "JPEG", quality=made.QUALITY)
        below = folder / f"{number // 10_000:04d}"
        below.mkdir(exist_ok=True)
        (below / f"{number:08d}.jpg").hardlink_to(original)
    return folder


def embed(model: str, source: Path, output: Path, flags: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in MB of the command."""
    words = [source, "--checkpoint", model, "--output", output, *flags]
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "grain_jax", "embed", *map(str, words)]) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"grain-jax embed ended with {child.returncode}")
    return time.monotonic() - began, used.ru_maxrss / 1024  # KB on Linux


def model_alone(model: str, dtype: str, turns: int) -> list[float]:
    """Images a second of the loaded model, of each turn."""
    import grain_jax

    predictor = grain_jax.load(model, dtype)
    side = predictor.model.image.image_size
    given = np.random.default_rng(0).integers(0, 256, (ALONE, side, side, 3), np.uint8)
    encode = predictor.encode_image
    if predictor.has_regions:
        encode = predictor.encode_image_and_regions
    timing = stopwatch.in_turns({"model": lambda: encode(given)}, turns)["model"]
    return [ALONE / seconds for seconds in timing.seconds]


def main() -> None:
    """Prints the figures."""
    args = harness.arguments(
        __doc__,
        images=([2000, 20_000], dict(nargs=2)),
        pixels=(int, dict(help="side of the JPEGs (default: 500 x 375)")),
        size=("B/16", dict(help="of a model with random weights")),
        checkpoint=(str, dict(help="a model, in place of --size")),
        dtype="float32",
        store="float32",
        turns=3,
    )
    result: dict[str, Any] = dict(machine=harness.machine("jax", "pyarrow", "pillow"))
    flags = ["--dtype", args.dtype, "--store", args.store]
    seconds, megabytes = ({n: [] for n in args.images} for _ in "ab")
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), args.checkpoint
        if model is None:
            model = str(folder / "model")
            random_weights.save(args.size, model)
        sources = {n: make_images(folder / f"images{n}", n, args.pixels) for n in args.images}
        for turn in range(args.turns):
            for count, source in sources.items():
                took, peak = embed(model, source, folder / f"out{turn}_{count}", flags)
                seconds[count].append(took)
                megabytes[count].append(peak)
        alone = model_alone(model, args.dtype, args.turns)
    few, many = args.images
    rates = [(many - few) / (b - a) for a, b in zip(seconds[few], seconds[many])]
    ratio = statistics.median(rates) / statistics.median(alone)
    table = harness.Table(dict(what="24", images_per_second=">24.1f", megabytes=">10.0f"))
    table.add(what="embed", images_per_second=rates)
    table.add(what="the model alone", images_per_second=alone)
    for count, peaks in megabytes.items():
        table.add(what=f"embed, {count} images", megabytes=max(peaks), seconds=seconds[count])
    print(f"ratio of images a second: {ratio:.2f}")
    harness.write(args.json, result | dict(arguments=vars(args), rows=table.rows, ratio=ratio))


if __name__ == "__main__":
    main()
