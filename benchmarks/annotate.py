"""Throughput of data.annotate without its models, with one process and with two, and memory at ten times the images.

    python -m benchmarks.annotate [--pictures 2000] [--turns 3] [--json OUT.json]

The images are JPEGs of 500 x 375 in tar shards. Beam's local runner reads and decodes each and writes its line. Memory
is the largest sum of the resident sets of the command and its children (Linux).
"""

import io
import json
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
import PIL.Image

from benchmarks import harness

IMAGES_PER_SHARD = 500
WORKERS = {1: (), 2: ("--direct_num_workers=2", "--direct_running_mode=multi_processing")}


def make_shards(folder: pathlib.Path, count: int) -> int:
    """Writes `count` images in tars, as img2dataset does; returns the size of one in bytes."""
    rng = np.random.default_rng(0)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((500, 375), PIL.Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noisy).save(file, "JPEG", quality=85)
    folder.mkdir()
    for first in range(0, count, IMAGES_PER_SHARD):
        with tarfile.open(folder / f"{first // IMAGES_PER_SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + IMAGES_PER_SHARD, count)):
                caption = f"image number {number}".encode()
                for ending, content in (("jpg", file.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return len(file.getvalue())


def _resident_bytes(session: int) -> int:
    """Sum of the resident sets of all processes of a session."""
    kilobytes = 0
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            process_session = (status.parent / "stat").read_text().rpartition(")")[2].split()[3]
            if int(process_session) == session:
                lines = status.read_text().splitlines()
                kilobytes += sum(int(x.split()[1]) for x in lines if x.startswith("VmRSS:"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
    return 1024 * kilobytes


def annotate(shards: pathlib.Path, output: pathlib.Path, workers: int) -> dict[str, float]:
    """Runs the command once; returns images/s and the largest memory in MB."""
    command = [sys.executable, "-m", "grain_jax.data.annotate", f"--images={shards}"]
    command += [f"--output={output}", "--passes=none", "--no-keep-images", *WORKERS[workers]]
    most, quiet = 0, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        while process.poll() is None:
            most = max(most, _resident_bytes(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    rate = json.loads((output / "summary.json").read_text())["this run"]["images/s"]
    return dict(pictures_per_s=rate, memory_mb=most / 1e6)


def main() -> None:
    """Prints the table; writes it as JSON on request."""
    args = harness.arguments(__doc__, pictures=2000, turns=3)
    harness.machine("apache-beam", "pillow")
    few, many = args.pictures, 10 * args.pictures
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = pathlib.Path(temporary), {}
        size = make_shards(folder / "few", few)
        make_shards(folder / "many", many)
        print(f"JPEGs of 500 x 375, {size} bytes, {IMAGES_PER_SHARD} a tar", flush=True)
        runs = [(workers, "few") for _ in range(args.turns) for workers in WORKERS]
        runs += [(workers, "many") for workers in WORKERS]
        for number, (workers, which) in enumerate(runs):  # the worker counts alternate
            result = annotate(folder / which, folder / f"out{number}", workers)
            found.setdefault((workers, which), []).append(result)
    columns = dict(workers=">7", pictures=">8", pictures_per_s=">24.0f", memory_mb=">9.0f")
    table = harness.Table(columns)
    for (workers, which), results in found.items():
        rates = [result["pictures_per_s"] for result in results]
        most = statistics.median(result["memory_mb"] for result in results)
        count = {"few": few, "many": many}[which]
        table.add(workers=workers, pictures=count, pictures_per_s=rates, memory_mb=most)
    for workers in WORKERS:
        less, more = (r["memory_mb"] for r in table.rows if r["workers"] == workers)
        print(f"{workers} worker(s): memory at {many} images is {more / less:.2f} of that at {few}")
    harness.write(args.json, dict(picture_bytes=size, runs=table.rows))


if __name__ == "__main__":
    main()
