"""Compares our input pipeline with a torch DataLoader, in turns in one run, and our images with PIL's.

    python -m benchmarks.input [--count 2000] [--batches 20] [--turns 5] [--pictures DIR] [--json OUT.json]

Makes N JPEGs of 500 x 375 (about 55 KB: noise with the spectrum of photographs) with captions and regions. It
builds records of them in three ways: unchanged, and resized to 224 as JPEG and as PNG. Our side is all of
`records.batches`: read, parse, decode, resize, tokenise, pack. The DataLoader has 2 workers, PIL as in the
reference or torchvision's decoder and resize, and open_clip's tokenizer. Each side runs in its own process; a
turn consumes the prefetched batches before its clock starts.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from benchmarks import harness, made, stopwatch
from grain_jax.core import images
from grain_jax.data import example

STORED_TURNS = 4  # factor of the batches a turn for images stored at 224, which are faster
AHEAD = 6  # batches that a side may prefetch while others run
SETTLE_SECONDS = 1.5  # time to prefetch them
PACKAGES = "tensorflow-cpu jax torch torchvision open_clip_torch pillow numpy".split()


def timed(batches: Iterator[Any], count: int) -> Callable[[], list[float]]:
    """Runs a turn of `count` batches; returns the seconds of all turns so far."""
    seconds: list[float] = []

    def turn() -> list[float]:
        for _ in range(AHEAD):
            next(batches)
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        seconds.append(time.perf_counter() - began)
        time.sleep(SETTLE_SECONDS)
        return seconds

    return turn


def our_side(folder: str, name: str, count: int) -> dict[str, Callable]:
    """Our pipeline on one of the sets."""
    from grain_jax.input_pipeline import records

    return {name: timed(records.batches(made.config(folder, name)), count)}


def torch_side(folder: str, kind: str, count: int) -> dict[str, Callable]:
    """A DataLoader on the image files, which decodes with PIL or torchvision."""
    from benchmarks import torch_images

    return {kind: timed(iter(torch_images.loader(epath.Path(folder), kind)), count)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two images, uint8, in dB; infinite where they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(20 * np.log10(255) - 10 * np.log10(error)) if error else float("inf")


def quality(paths: Sequence[epath.Path], name: str) -> dict[str, float]:
    """Compares images as training reads them with PIL's resize of the file; prints and returns distances."""
    from grain_jax.input_pipeline import transforms

    ways = {"original": (0, 0), "png": (made.SIZE, 0), "jpeg": (made.SIZE, 95)}
    distances, ratios = {kind: [] for kind in ways}, []
    for path in paths:
        encoded = path.read_bytes()
        image = images.decode_image(encoded, str(path))
        expected = images.resize(image, made.SIZE)
        for kind, (size, setting) in ways.items():
            stored = example.encode_image(image, encoded, example.Encoding(kind, setting, size))
            seen = transforms.resize(transforms.decode(stored), made.SIZE).numpy()
            distances[kind].append(np.abs(seen.astype(int) - expected))
        ratios.append(psnr(seen, expected))  # of the JPEG
    differences = dict(
        full_size_worst=max(int(d.max()) for d in distances["original"]),
        full_size_mean=float(np.mean([d.mean() for d in distances["original"]])),
        png_worst=max(int(d.max()) for d in distances["png"]),
        jpeg_psnr_mean=statistics.mean(ratios),
        jpeg_psnr_least=min(ratios),
    )
    figures = ", ".join(f"{key} {value:.3f}" for key, value in differences.items())
    print(f"{len(paths)} {name} images against PIL's resize, levels of 255 and dB: {figures}")
    return differences


def throughput(folder: str, batches: int, turns: int) -> list[dict[str, Any]]:
    """Times all sides, prints their table and returns its rows."""
    kinds = ("PIL", "torchvision")
    options = dict(folder=folder, count=batches)
    sides: dict[str, Any] = {f"DataLoader {kind}": (torch_side, options | dict(kind=kind)) for kind in kinds}
    for name in made.SETS:
        more = dict(name=name, count=batches * (1 if name == "full_size" else STORED_TURNS))
        sides[f"ours {name}"] = (our_side, options | more)
    timings = stopwatch.measure(sides, turns).values()
    rates = {  # the first turn is warm-up
        side: [options["count"] * made.BATCH / seconds for seconds in timing.value[1:]]
        for (side, (_, options)), timing in zip(sides.items(), timings, strict=True)
    }
    medians = {side: statistics.median(values) for side, values in rates.items()}
    columns = dict(pipeline="24", images_per_second=">24.0f", of_PIL=">8.2f")
    table = harness.Table(columns | dict(of_torchvision=">15.2f"))
    for side, values in rates.items():
        ratios = {f"of_{kind}": medians[side] / medians[f"DataLoader {kind}"] for kind in kinds}
        table.add(pipeline=side, images_per_second=values, **ratios)
    return table.rows


def main() -> None:
    """Makes the data, and prints throughput and quality."""
    args = harness.arguments(
        __doc__,
        count=(2000, dict(help="number of images to make")),
        batches=(20, dict(help=f"of {made.BATCH} images, a turn")),
        turns=5,
        pictures=(epath.Path, dict(help="folder of real images, for the comparison with PIL")),
    )
    suffixes = (".jpg", ".jpeg", ".png")
    real: list[epath.Path] = []
    if args.pictures:
        real = sorted(p for p in args.pictures.iterdir() if p.suffix.lower() in suffixes)
    result: dict[str, Any] = dict(machine=harness.machine(*PACKAGES), batch=made.BATCH)
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        made.make(folder, args.count)
        paths = sorted((folder / "images").glob("*.jpg"))
        result["bytes"] = round(statistics.mean(path.stat().length for path in paths))
        print(f"{len(paths)} JPEGs of {made.WIDTH} x {made.HEIGHT}, {result['bytes']:,} B each")
        result["throughput"] = throughput(str(folder), args.batches, args.turns)
        result["quality"] = {"made": quality(paths[:100], "made")}
        if args.pictures:
            result["quality"]["real"] = quality(real, "real")
    harness.write(args.json, result)


if __name__ == "__main__":
    main()
