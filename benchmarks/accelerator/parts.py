"""The parts of the measurement: generators of rows. Each runs in a process of its own and imports there."""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

ROOT = epath.Path(__file__).absolute().parent.parent.parent
SIZES = ("tiny", "S/16", "B/16", "L/14")
DEFAULT_SIZES = {"cpu": ["tiny"], "gpu": ["B/16", "S/16"], "tpu": ["B/16", "S/16"]}
BATCHES = (256, 128, 64, 32)  # the largest is taken whose estimate fits
TINY_BATCH = 16
ROOM = 1.0  # share of the memory that the estimate may fill; it has the scores, which a kernel does not keep
TURNS = {"cpu": (1, 3, 1), "gpu": (3, 5, 10), "tpu": (3, 5, 10)}  # warm-up, turns, steps of a turn
CUDA_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cu126"


def look(sizes: Sequence[str] | None, batch: int | None) -> Iterator[dict[str, Any]]:
    """The device, and the batch of each size: `batch`, or the largest that should fit."""
    import jax
    from jax.extend import backend

    from grain_jax.training import memory_check

    device = jax.devices()[0]
    limit, on_cpu = memory_check.limit().bytes, device.platform == "cpu"
    batches = {
        size: batch or (TINY_BATCH if on_cpu else largest_batch(size, limit))
        for size in sizes or DEFAULT_SIZES[device.platform]
    }
    yield dict(
        platform=device.platform,
        kind=device.device_kind,
        runtime=backend.get_backend().platform_version.splitlines()[0],
        memory=limit,
        batches=batches,
    )


def largest_batch(size: str, limit: float) -> int:
    """The first of BATCHES for which the estimate fills at most ROOM of `limit` bytes, or the last."""
    import jax

    from grain_jax.training import memory_need, sharding

    for batch in BATCHES:
        config = make_config(size, batch, "auto")
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        if memory_need.estimate(config, mesh).total(batch, 1) <= ROOM * limit:
            break
    return batch


def make_config(size: str, batch: int, attention: str):
    """The packed recipe of `benchmarks.train_step` with that attention."""
    from benchmarks import train_step

    return train_step.make_config(size, batch, **{"model.attention": attention})


def timed(
    step: Callable[[], Any], wait: Callable[[Any], Any], platform: str
) -> tuple[list[float], Any]:
    """(seconds of a step in each turn, output of the last step); a turn ends when its last output is there."""
    warm_up, turns, count = TURNS[platform]
    out, seconds = None, []
    for _ in range(warm_up):
        out = step()
    wait(out)
    for _ in range(turns):
        began = time.perf_counter()
        for _ in range(count):
            out = step()
        wait(out)
        seconds.append((time.perf_counter() - began) / count)
    return seconds, out


def _rates(config, seconds: list[float], kind: str, dtype: str) -> dict[str, Any]:
    """What a row of the table of steps says of its seconds; MFU is of the packed model, whoever computes it."""
    from grain_jax.training import flops

    rate = config.batch_size / statistics.median(seconds)
    peak = flops.peak_flops(kind, dtype)
    return dict(
        batch=config.batch_size,
        seconds=seconds,
        images_per_second=rate,
        mfu=rate * flops.per_image(config).train / peak if peak else None,
    )


def halved(
    batch: int,
    run: Callable[[int], Iterator[dict[str, Any]]],
    is_full: Callable[[Exception], bool],
) -> Iterator[dict[str, Any]]:
    """The rows of `run(batch)`; of half the batch where memory runs out, down to 8."""
    while True:
        try:
            yield from run(batch)
            return
        except Exception as error:
            if not is_full(error) or batch < 16:
                raise
        yield dict(left_out=f"out of memory at batch {batch}")
        batch //= 2


def our_step(size: str, batch: int, attention: str, profile: str) -> Iterator[dict[str, Any]]:
    """The step of the trainer; half the batch where memory runs out. Profiled where `attention` is `profile`."""
    run = lambda batch: _our_step(size, batch, attention, attention == profile)
    return halved(batch, run, lambda error: "RESOURCE_EXHAUSTED" in str(error))


def _our_step(size: str, batch: int, attention: str, profiled: bool) -> Iterator[dict[str, Any]]:
    import jax

    from benchmarks.accelerator import profile
    from benchmarks.train_step import TrainStep

    config, chip = make_config(size, batch, attention), jax.devices()[0]
    step = TrainStep(config)
    both = lambda: (step(), step.held[0].step)[::-1]
    seconds, (_, metrics) = timed(both, jax.block_until_ready, chip.platform)
    peak = (chip.memory_stats() or {}).get("peak_bytes_in_use")  # before the profiler adds to it
    need = step.compiled.memory_analysis()
    yield dict(
        size=size,
        side=f"ours, {attention}",
        **_rates(config, seconds, chip.device_kind, config.dtype),
        peak_bytes=peak,
        compiled_bytes=need
        and need.argument_size_in_bytes
        + need.output_size_in_bytes
        - need.alias_size_in_bytes
        + need.temp_size_in_bytes
        + need.generated_code_size_in_bytes,
        loss=float(metrics["loss"]),
    )
    if profiled:
        with tempfile.TemporaryDirectory() as folder:
            file = profile.trace(both, folder)
            yield dict(operations=profile.operations(file, step.compiled.as_text()))


def torch_step(size: str, batch: int, platform: str) -> Iterator[dict[str, Any]]:
    """The step of `benchmarks.torch_step`, packed and padded; on a GPU by torch.compile under bfloat16 autocast."""
    if platform == "tpu":
        yield dict(left_out="not compared on TPUs")
        return
    if importlib.util.find_spec("torch") is None:
        yield dict(left_out=f"needs PyTorch: {CUDA_TORCH if platform == 'gpu' else 'torch'}")
        return
    import torch

    from benchmarks import train_step
    from grain_jax.input_pipeline import synthetic

    cuda = platform == "gpu"
    if cuda and not torch.cuda.is_available():
        yield dict(left_out=f"this PyTorch sees no GPU: {CUDA_TORCH}")
        return
    torch.set_float32_matmul_precision("high")
    step = train_step.torch_model(size, "cuda" if cuda else "cpu", compiled=cuda)
    kind = torch.cuda.get_device_name(0) if cuda else "cpu"

    def run(batch: int, packed: bool) -> Iterator[dict[str, Any]]:
        config = make_config(size, batch, "xla")
        if cuda:
            step.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        placed = step.place(next(synthetic.batches(config)), packed=packed)
        seconds, loss = timed(lambda: step.timed(placed), lambda loss: loss, platform)
        yield dict(
            size=size,
            side=f"PyTorch {'packed' if packed else 'padded'}",
            **_rates(config, seconds, kind, "bfloat16" if cuda else "float32"),
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            loss=loss,
            torch=torch.__version__,
        )

    is_full = lambda error: isinstance(error, torch.cuda.OutOfMemoryError)
    for packed in (True, False):
        yield from halved(batch, lambda batch, packed=packed: run(batch, packed), is_full)


def plan(kind: str, size: str, batch: int, attention: str) -> Iterator[dict[str, Any]]:
    """What `grain-jax plan` says of the step on one such device, for the row of the same `attention`."""
    from grain_jax.launch import arguments, chips
    from grain_jax.launch import plan as plan_lib

    named = [chip for chip in chips.CHIPS.values() if chip.device_kind == kind]
    if not named:
        yield dict(left_out=f"no chip of grain_jax.launch.chips is called {kind!r}")
        return
    topology = f"{named[0].name}:{'x'.join('1' * (named[0].axes or 1))}"
    # By `auto`, which a plan resolves for its chip: to ask for cuDNN takes a machine that has it.
    config = dataclasses.replace(make_config(size, batch, "auto"), dtype="bfloat16")
    made = plan_lib.make(config, chips.parse_topology(topology), arguments.PlanOptions())
    yield dict(
        size=size,
        batch=batch,
        attention=attention,
        topology=topology,
        estimate=made["estimate"],
        bytes=made["memory"]["total_bytes"],
        seconds=made["roofline"]["step_s"] if made["roofline"] else float("nan"),
    )


def input_wait(size: str, batch: int, quick: bool) -> Iterator[dict[str, Any]]:
    """The share of the time that a short training waits for its input: JPEGs of 224 pixels, made for it."""
    if not all(map(importlib.util.find_spec, ("tensorflow", "tensorflow_datasets"))):
        packages = "tensorflow-cpu tensorflow-datasets importlib_resources"
        yield dict(left_out=f"needs TensorFlow: pip install {packages}")
        return
    from benchmarks import harness
    from benchmarks.input import made

    images, steps, every = (64, 12, 4) if quick else (3 * batch, 80, 10)
    keys = {"total_steps": steps, "optim.warmup_steps": 1, "log_every": every, "mesh.data": -1}
    keys |= {"batch_size": batch, "dtype": "float32" if quick else "bfloat16"}
    keys |= {"checkpoint_every": 0, "input.lanes": None, "input.name": "jpeg_224"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        made.make(folder / "data", images, ("jpeg_224",))
        keys |= {"input.data_dir": str(folder / "data" / "records")}
        command = harness.trainer(folder, size, keys, folder / "run")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        piped = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run(command, env=environment, **piped)
        if done.returncode:
            line = next(reversed(done.stdout.strip().splitlines()), "")
            yield dict(left_out=f"the trainer ended with {done.returncode}: {line[:300]}")
            return
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        rows = [line for line in lines if "input_wait_fraction" in line]
    settled = rows[1:] or rows  # the first line has the start
    yield dict(
        what=f"{size}, batch {batch}, JPEGs of 224 pixels, {len(os.sched_getaffinity(0))} cores",
        steps_a_line=every,
        wait_fractions=[row["input_wait_fraction"] for row in settled],
        images_per_second=statistics.median(row["images_per_second"] for row in settled),
    )
