"""Images a second of `grain-jax embed` beside the tower alone, and its peak memory at two numbers of images.

    python -m benchmarks.embed [--images 2000] [--size B/16 | --checkpoint M] [--turns 5] [--memory 10000 100000]
        [--search 100000] [--json OUT.json]

Speed: in one process, in turns. `embed` lists a folder of JPEGs, reads, decodes, encodes and writes Parquet files;
`tower` encodes the same images, decoded and resized before, in the same batches and as far ahead. The ratio of the
medians is what reading and writing cost. Memory: the whole command on a folder of that many images, a process each; the
images are hard links to 500 different ones. Search: the seconds of one query over random vectors of that many images
(D = 512, 5 regions each), and whether it finds what a float64 product of all finds. `--memory` or `--search` without
numbers leaves it out.
"""

import argparse
import functools
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from grain_jax.data.embed import __main__ as command
from grain_jax.data.embed import output, parts, pipeline

import grain_jax
from benchmarks import harness, interop
from benchmarks.input import made
from grain_jax.files import embeddings
from grain_jax.inference import predictor as predictor_lib
from grain_jax.inference import search, stream

DIFFERENT = 500  # images
IN_MEMORY = 4096  # images at most, that the tower alone encodes in turn
DIM, REGIONS, PER_FILE = 512, 5, 4096  # of the vectors that are searched


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


def speed(model: str, source: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The turns of `embed` and of `tower`: seconds, and images a second by the median."""
    predictor = grain_jax.load(model, args.dtype)
    size, encode = predictor.model.image.image_size, pipeline.encoder(predictor)
    threads = args.threads or pipeline.default_threads()
    batch_size = predictor_lib.MAX_BATCH * jax.local_device_count()
    turn = iter(range(1000))

    def find(folder: Path) -> parts.Listing:
        whole = dict(images=None, split="", shard_size=PER_FILE)
        return parts.find(str(source), scratch=parts.absolute(folder), **whole)

    def embed() -> int:
        folder = scratch / f"turn{next(turn)}"
        found = find(folder)
        settings = _settings(predictor.model.embed_dim, len(found.parts), store=args.store)
        settings = msgspec.structs.replace(
            settings, regions="queries" if predictor.has_regions else ""
        )
        job = output.Output(parts.absolute(folder), settings, found.parts)
        job.finished()
        given = dict(size=size, threads=threads, label="embed", known=True)
        return pipeline.run(job, range(len(found.parts)), encode, **given, before=[], most_faults=0)

    reads = [read for part in find(scratch / "list").parts for read in parts.images(part)]
    with ThreadPoolExecutor(threads) as pool:
        ready = list(pool.map(lambda read: pipeline.prepare(read, size), reads[:IN_MEMORY]))
    count = len(reads)

    def tower() -> int:
        numbers = [range(n, min(n + batch_size, count)) for n in range(0, count, batch_size)]
        batches = ([ready[i % len(ready)] for i in batch] for batch in numbers)
        with ThreadPoolExecutor(pipeline.AT_DEVICE) as pool:
            done = stream.ahead(encode, batches, pool, pipeline.AT_DEVICE)
            return sum(map(len, done))

    timings = harness.in_turns({"embed": embed, "tower": tower}, turns=args.turns)
    harness.agree({name: timing.value for name, timing in timings.items()}, 0.0, "images")
    return {
        name: dict(seconds=timing.seconds, images_per_second=count / timing.median)
        for name, timing in timings.items()
    }


def _settings(dim: int, files: int, store: Any = "float32") -> embeddings.Settings:
    source = embeddings.Source("tars", "", "", "", "")
    return embeddings.Settings(
        checkpoint="",
        model=embeddings.Digests("", ""),
        embed_dim=dim,
        regions="queries",
        image_size=0,
        dtype="float32",
        store=store,
        shard_size=0,
        source=source,
        parts=files,
        orientation="exif",
    )


def memory(model: str, source: Path, scratch: Path, store: str) -> dict[str, float]:
    """Peak memory of the command in MB, and its seconds."""
    words = [source, "--checkpoint", model, "--output", scratch, "--store", store]
    words = [sys.executable, "-m", "benchmarks.embed", "--child", *map(str, words)]
    began = time.monotonic()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    seconds = round(time.monotonic() - began, 1)
    return dict(megabytes=float(done.stdout.split()[-1]), seconds=seconds)


def timed_search(count: int, folder: Path, turns: int) -> dict[str, Any]:
    """Seconds of a query by regions and by images, and the share of the best ten that it finds."""
    root, rng = parts.absolute(folder), np.random.default_rng(0)
    starts = range(0, count, PER_FILE)
    settings = _settings(DIM, len(starts))
    output.agree(root, settings)
    tar = {"reader": "webdataset", "size": PER_FILE, "tar": "", "prefix": ""}
    job = output.Output(root, settings, [{"name": str(start), **tar} for start in starts])
    job.finished()
    query = rng.standard_normal((1, DIM))
    query = (query / np.linalg.norm(query)).astype(np.float32)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (REGIONS, 1))
    scores = {by: np.zeros(count) for by in search.BY}
    for index, start in enumerate(starts):
        n = min(PER_FILE, count - start)
        vectors = rng.standard_normal((n, 1 + REGIONS, DIM), np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        exact = vectors.astype(np.float64) @ query[0].astype(np.float64)
        scores["images"][start : start + n] = exact[:, 0]
        scores["regions"][start : start + n] = exact[:, 1:].max(axis=1)
        writer = output.Writer(job, index)
        for i, row in enumerate(vectors):
            name = str(start + i)
            writer.add(output.Row(name, name, 1, 1, row[0], row[1:], boxes))
        writer.close()
    opened, out = search.Index(root), {}
    for by in search.BY:
        ask = functools.partial(search.search, opened, query, top=10, by=by)
        timing = harness.in_turns({by: ask}, turns=turns)[by]
        best = set(map(str, np.argsort(-scores[by])[:10].tolist()))
        recall = len(best & {hit.id for hit in timing.value[0]}) / 10
        out[by] = dict(seconds=timing.seconds, recall=recall)
    return out


def _child(words: list[str]) -> int:
    status = command.main(words)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # KB on Linux
    return status


def main() -> int:
    """Prints the figures."""
    if sys.argv[1:2] == ["--child"]:
        return _child(sys.argv[2:])
    args = harness.arguments(
        __doc__,
        images=2000,
        pixels=(int, dict(help="side of the JPEGs (default: 500 x 375)")),
        size=("B/16", dict(help="of a model with random weights")),
        checkpoint=(str, dict(help="a model, in place of --size")),
        dtype="float32",
        store="float32",
        threads=int,
        turns=5,
        memory=([10_000, 100_000], dict(nargs="*")),
        search=([100_000], dict(nargs="*")),
    )
    result: dict[str, Any] = dict(machine=harness.machine("jax", "pyarrow", "pillow"))
    result |= dict(arguments=vars(args), memory={}, search={})
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), args.checkpoint
        if model is None:
            model = str(folder / "model")
            interop.save(args.size, model)
        if args.turns:
            source = make_images(folder / "images", args.images, args.pixels)
            result["speed"] = found = speed(model, source, folder / "out", args)
            for name, side in found.items():
                rates = [args.images / s for s in side["seconds"]]
                print(f"{name:6} {harness.spread(rates, digits=1)} images/s", flush=True)
            rates = [found[name]["images_per_second"] for name in ("embed", "tower")]
            result["ratio"] = rates[0] / rates[1]
            print(f"ratio  {result['ratio']:.3f}", flush=True)
        for count in args.memory:
            source = make_images(folder / f"images{count}", count, args.pixels)
            peak = memory(model, source, folder / f"out{count}", args.store)
            result["memory"][count] = peak
            print(f"{count} images: {peak['megabytes']:.0f} MB, {peak['seconds']} s", flush=True)
        peaks = [peak["megabytes"] for peak in result["memory"].values()]
        if len(peaks) > 1:
            print(f"ratio  {max(peaks) / min(peaks):.3f}")
        for count in args.search:
            found = timed_search(count, folder / f"search{count}", args.turns or 3)
            result["search"][count] = found
            for by, side in found.items():
                seconds = harness.spread(side["seconds"])
                print(f"search of {count} by {by}: {seconds} s, recall {side['recall']:.0%}")
    harness.write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
