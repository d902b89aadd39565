"""Compares our input pipeline with a torch DataLoader, in turns in one run, and measures the CPU time of our stages.

    python -m benchmarks.input [--count 2000] [--batches 20] [--turns 5] [--pictures DIR] [--json OUT.json]

Makes N JPEGs of 500 x 375 (about 55 KB: noise with the spectrum of photographs) with captions and regions, and builds
records of them in three ways: unchanged, and resized to 224 as JPEG and as PNG. Our side is all of `records.batches`:
read, parse, decode, resize, tokenise, pack. The DataLoader has 2 workers, PIL as in the reference or torchvision's decoder
and resize, and open_clip's tokenizer. Each side runs in its own process; a turn consumes the prefetched batches before
its clock starts. Then the images are compared with those of PIL, and the CPU time of an image is divided by stage.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
from etils import epath
from grain_jax.data import build, example, parallel

from benchmarks import side_by_side
from grain_jax import config as config_lib
from grain_jax import recipe
from grain_jax.files import images

SIZE = 224
HEIGHT, WIDTH = 375, 500  # of the JPEGs
QUALITY = 80  # of the JPEGs: 55 KB each
WORKERS = 2
SETS = {  # name: arguments of data.build
    "full_size": ("--encoding=original",),
    "jpeg_224": ("--encoding=jpeg:95", f"--store-size={SIZE}"),
    "png_224": ("--encoding=png", f"--store-size={SIZE}"),
}
BATCH = 64
STORED_TURNS = 4  # factor of the batches a turn for images stored at 224, which are faster
AHEAD = 6  # batches that a side may prefetch while others run
SETTLE_SECONDS = 1.5  # time to prefetch them
_WORDS = (
    "a the of with and on in small large red green blue yellow bright dark long short round curved wing beak tail"
    " feather bird dog car tree house window street river stone wooden metal striped spotted smooth shiny old new"
    " standing sitting flying near under beside between two three morning evening water grass photo close view"
).split()


def make_image(number: int) -> PIL.Image.Image:
    """Noise whose amplitude falls with frequency as 1/f^1.25, in correlated colours."""
    rng = np.random.default_rng(number)
    shape = (384, 512)  # a fast size for the FFT; the image is a crop
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
    words = lambda least, most: " ".join(rng.choice(_WORDS, rng.integers(least, most + 1)))  # noqa: E731
    corner = rng.uniform(0, 0.5, (5, 2)) * (WIDTH, HEIGHT)
    extent = rng.uniform(0.1, 0.5, (5, 2)) * (WIDTH, HEIGHT)
    return {
        "image": f"{number:06d}.jpg",
        "caption": words(8, 18),
        "synthetic_caption": words(8, 18),
        "regions": [
            {
                "box": [*map(float, corner[i]), *map(float, corner[i] + extent[i])],
                "description": words(2, 10),
                "score": float(rng.uniform(0.3, 1)),
            }
            for i in range(rng.integers(0, 6))
        ],
    }


def _save_image(number: int, folder: str) -> None:
    with (epath.Path(folder) / f"{number:06d}.jpg").open("wb") as file:
        make_image(number).save(file, "JPEG", quality=QUALITY)


def make_data(folder: epath.Path, count: int, sets: Sequence[str] = tuple(SETS)) -> None:
    """Makes the images, `A.jsonl` and the `sets` in `folder`."""
    (folder / "images").mkdir(parents=True)
    save = functools.partial(_save_image, folder=str(folder / "images"))
    for _ in parallel.ordered_map(save, range(count), workers=WORKERS):
        pass
    lines = (json.dumps(annotation(number)) + "\n" for number in range(count))
    (folder / "A.jsonl").write_text("".join(lines))
    for name in sets:
        status = build.main(
            [
                f"--annotations={folder / 'A.jsonl'}",
                f"--images={folder / 'images'}",
                f"--output={folder / 'records'}",
                f"--name={name}",
                *SETS[name],
                "--num-shards=16",
            ]
        )
        if status:
            raise RuntimeError(f"data.build {name} ended with {status}")


def make_config(folder: epath.PathLike, name: str) -> config_lib.Config:
    """The recipe on one of the sets."""
    values = recipe.base("B/16")
    values.total_steps, values.optim.warmup_steps = 1000, 10
    values.batch_size = BATCH
    values.input.update(dict(data_dir=str(epath.Path(folder) / "records"), name=name, lanes=4))
    values.text.update(dict(pack_group=16, pack_rows=10))
    return config_lib.from_dict(values)


def timed(batches: Iterator[Any], count: int) -> Callable[[], list[float]]:
    """Runs a turn of `count` batches; returns the seconds of all turns so far.

    A side prefetches while others run. The clock starts after the prefetched batches are consumed, and the turn ends
    with a pause in which the side prefetches again.
    """
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

    return {name: timed(records.batches(make_config(folder, name)), count)}


def torch_side(folder: str, kind: str, count: int) -> dict[str, Callable]:
    """A DataLoader on the image files, which decodes with PIL or torchvision."""
    import torch

    from benchmarks import torch_input

    dataset = torch_input.Images(epath.Path(folder), kind, SIZE)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1 << 40),
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=torch_input.collate,
    )
    return {kind: timed(iter(loader), count)}


def profile_side(folder: str, name: str, count: int) -> dict[str, Callable]:
    """The pipeline's stages on one of the sets: a callable that returns {stage: CPU ms an image} a turn.

    The time of a stage is the difference to a pipeline without it; the text stages are timed directly.
    """
    import contextlib
    from unittest import mock

    import jax
    import tensorflow as tf

    from grain_jax.input_pipeline import assemble, device, records, transforms

    config = make_config(folder, name)
    spent = dict(tokenise=0.0, pack=0.0)

    def counted(stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            began = time.thread_time()
            out = function(*args, **kwargs)
            spent[stage] += time.thread_time() - began
            return out

        return run

    # Replacements of almost no cost that depend on the same inputs, so that TensorFlow does not prune earlier stages.
    def flat(number):
        return tf.fill([SIZE, SIZE, 3], tf.cast(number % 2, tf.uint8))

    def constant(record, draws):
        regions = config.input.max_regions
        return transforms.Example(
            image=flat(tf.strings.length(record)),
            captions=tf.constant(["a bird"]),
            caption_mask=tf.constant([True]),
            descriptions=tf.fill([regions], "a wing"),
            region_boxes_cxcywh=tf.zeros([regions, 4]) + 0 * draws[0],
            region_mask=tf.ones([regions], tf.bool),
            region_scores=tf.ones([regions]),
            flipped=tf.constant(False),
        )

    no_resize = mock.patch.object(
        transforms, "resize", lambda image, size: flat(tf.shape(image)[0])
    )
    no_decode = mock.patch.object(
        transforms, "decode", lambda encoded: flat(tf.strings.length(encoded))
    )
    nothing = mock.patch.object(transforms.Transform, "from_config", lambda config: constant)
    pipelines = {}
    for what, patches in (
        ("whole", ()),
        ("no resize", (no_resize,)),
        ("no image", (no_resize, no_decode)),
        ("read", (nothing,)),
    ):
        pipelines[what] = records.batches(config)
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            next(pipelines[what])  # builds the graph
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    turns: list[dict[str, float]] = []

    def milliseconds(seconds: float) -> float:
        return 1000 * seconds / (count * BATCH)

    def turn() -> list[dict[str, float]]:
        total, texts = {}, {}
        for what, batches in pipelines.items():
            for _ in range(AHEAD):
                next(batches)
            spent.update(tokenise=0.0, pack=0.0)
            began = time.process_time()
            for _ in range(count):
                batch = next(batches)
            total[what] = milliseconds(time.process_time() - began)
            texts[what] = {stage: milliseconds(seconds) for stage, seconds in spent.items()}
            time.sleep(SETTLE_SECONDS)
        began = time.process_time()
        for _ in range(count):
            jax.block_until_ready(device.shard_batch(batch, sharding))
        to_device = milliseconds(time.process_time() - began)
        read = total["read"] - sum(texts["read"].values())
        turns.append(
            {
                "read, order, batch": read,
                "parse, choose": total["no image"] - sum(texts["no image"].values()) - read,
                "decode": total["no resize"] - total["no image"],
                "resize": total["whole"] - total["no resize"],
                **texts["whole"],
                "to the device": to_device,
            }
        )
        return turns

    for function, stage in (("tokenize", "tokenise"), ("assemble", "pack")):
        setattr(assemble, function, counted(stage, getattr(assemble, function)))
    return {name: turn}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two images, uint8, in dB; infinite where they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(20 * np.log10(255) - 10 * np.log10(error)) if error else float("inf")


def quality(paths: Sequence[epath.Path]) -> dict[str, Any]:
    """Compares images as training reads them with PIL's resize of the file.

    Returns: worst and mean difference (in levels) of full-size images and of PNGs, mean and least PSNR of JPEGs, and
      the number of images.
    """
    from grain_jax.input_pipeline import transforms

    differences, ratios = {"original": [], "png": []}, []
    for path in paths:
        encoded = path.read_bytes()
        image = images.decode_image(encoded, str(path))
        expected = images.resize(image, SIZE)
        for kind, size, setting in (("original", 0, 0), ("png", SIZE, 0), ("jpeg", SIZE, 95)):
            stored, _ = example.encode_image(image, encoded, example.Encoding(kind, setting, size))
            seen = transforms.resize(transforms.decode(stored), SIZE).numpy()
            if kind == "jpeg":
                ratios.append(psnr(seen, expected))
            else:
                differences[kind].append(np.abs(seen.astype(int) - expected))
    return dict(
        pictures=len(paths),
        full_size_worst=max(int(d.max()) for d in differences["original"]),
        full_size_mean=float(np.mean([d.mean() for d in differences["original"]])),
        png_worst=max(int(d.max()) for d in differences["png"]),
        jpeg_psnr_mean=statistics.mean(ratios),
        jpeg_psnr_least=min(ratios),
    )


def throughput(folder: epath.Path, batches: int, turns: int) -> dict[str, Any]:
    """Times all sides, prints their table and returns it."""
    sides: dict[str, Any] = {
        f"DataLoader {kind}": (torch_side, dict(folder=str(folder), kind=kind, count=batches))
        for kind in ("PIL", "torchvision")
    }
    counts = {name: batches * (1 if name == "full_size" else STORED_TURNS) for name in SETS}
    for name, count in counts.items():
        sides[f"ours {name}"] = (our_side, dict(folder=str(folder), name=name, count=count))
    timings = side_by_side.measure(sides, turns=turns)
    table = {}
    for name, timing in timings.items():
        side = name.rpartition(" ")[0]
        count = counts.get(name.rpartition(" ")[2], batches)
        rates = [
            count * BATCH / seconds for seconds in timing.value[1:]
        ]  # the first turn is warm-up
        table[side] = dict(images_per_second=rates)
    pil, torchvision = (
        statistics.median(table[f"DataLoader {kind}"]["images_per_second"])
        for kind in ("PIL", "torchvision")
    )
    print(
        f"{'pipeline':24} {'images/s: median (least - most)':>32} {'of PIL':>8} {'of torchvision':>15}"
    )
    for side, row in table.items():
        rates = row["images_per_second"]
        row.update(
            of_pil=statistics.median(rates) / pil,
            of_torchvision=statistics.median(rates) / torchvision,
        )
        print(
            f"{side:24} {side_by_side.spread(rates, digits=0):>32} {row['of_pil']:7.2f}x"
            f" {row['of_torchvision']:14.2f}x"
        )
    return table


def profile(folder: epath.Path, batches: int, turns: int) -> dict[str, dict[str, float]]:
    """Profiles each set, prints the table and returns the medians."""
    out = {}
    for name in SETS:
        side = (profile_side, dict(folder=str(folder), name=name, count=batches))
        (timing,) = side_by_side.measure({"profile": side}, turns=turns).values()
        measured = timing.value[1:]
        out[name] = {
            stage: statistics.median(turn[stage] for turn in measured) for stage in measured[0]
        }
    print(f"{'CPU ms an image':24} " + "".join(f"{name:>12}" for name in SETS))
    for stage in out["full_size"]:
        print(f"{stage:24} " + "".join(f"{out[name][stage]:12.3f}" for name in SETS))
    print(f"{'all':24} " + "".join(f"{sum(out[name].values()):12.3f}" for name in SETS))
    return out


def main() -> int:
    """Makes the data, and prints throughput, quality and profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="number of images to make")
    parser.add_argument("--batches", type=int, default=20, help=f"of {BATCH} images, a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--pictures", type=epath.Path, help="folder of real images, for the comparison with PIL"
    )
    parser.add_argument(
        "--data",
        type=epath.Path,
        help="folder to keep the data in, or with the data of an earlier run",
    )
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # as in records.py; the processes of the sides inherit it
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    machine = side_by_side.machine(
        *("tensorflow-cpu", "jax", "torch", "torchvision", "open_clip_torch", "pillow", "numpy")
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.data or epath.Path(temporary)
        if not (folder / "A.jsonl").exists():
            make_data(folder, args.count)
        made = sorted((folder / "images").glob("*.jpg"))
        size = round(statistics.mean(path.stat().length for path in made))
        print(side_by_side.on(machine))
        print(f"{len(made)} JPEGs of {WIDTH} x {HEIGHT}, {size / 1000:.0f} kB each; batch {BATCH}")
        table = throughput(folder, args.batches, args.turns)
        qualities = {"made": quality(made[:100])}
        if args.pictures:
            real = [
                p for p in args.pictures.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")
            ]
            qualities["real"] = quality(sorted(real))
        for name, q in qualities.items():
            print(
                f"{q['pictures']} {name} images against PIL's resize: from full size mean"
                f" {q['full_size_mean']:.3f} and worst {q['full_size_worst']} levels of 255 off; PNG worst"
                f" {q['png_worst']}; JPEG q95 PSNR mean {q['jpeg_psnr_mean']:.1f}, least"
                f" {q['jpeg_psnr_least']:.1f} dB"
            )
        stages = profile(folder, args.batches, args.turns)
    result = dict(
        machine=machine,
        pictures=dict(count=len(made), height=HEIGHT, width=WIDTH, bytes=size),
        batch=BATCH,
        size=SIZE,
        throughput=table,
        quality=qualities,
        cpu_milliseconds=stages,
    )
    side_by_side.write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
