"""The first ten minutes with a GPU or TPU: what it computes, how fast, and whether a killed run resumes.

    python -m benchmarks.accelerator [--size B/16] [--batch 128] [--steps 50] [--small] [--output FILE]

Checks attention and losses, with gradients, against float64 on the host; times the train step on all devices
of this machine beside the bound of `grain-jax plan`; kills `grain-jax train`, resumes it, and compares every
number of `metrics.jsonl` with an uninterrupted run. Prints a Markdown table and writes it to --output. The
status is 1 if a check fails. --small takes tiny shapes, for a CPU and the tests.
"""

import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import harness, our_step, replicas
from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.config import recipe
from grain_jax.input_pipeline import device, synthetic
from grain_jax.launch import chips, hlo, plan, tune
from grain_jax.models import attention, layers
from grain_jax.train import flops, goodput, layer_trials, memory_check, sharding, train_step

# Of errors relative to float64: of the norm of a layer's output and gradients, and of losses.
BOUNDS = {"float32": 5e-5, "bfloat16": layer_trials.TOLERANCE}
FUSED = {"cpu": "pallas", "tpu": "pallas", "gpu": "cudnn"}  # on a CPU the kernel is interpreted
PATIENCE = 900  # seconds until a run that is to be killed is half done


class Row(NamedTuple):
    """A line of the table."""

    check: str
    measured: str
    expected: str
    ok: bool = True

    def __str__(self) -> str:
        return f"| {self.check} | {self.measured} | {self.expected} | {'ok' if self.ok else 'DIFFERS'} |"


def _error(name: str, error: float, bound: float) -> Row:
    return Row(name, f"differs by {error:.1e}", f"at most {bound:.0e}", bool(error <= bound))


def _with_gradients(function: Callable[[Any], Any], arrays: Any) -> Any:
    """The function's value and the gradients of the arrays, for fixed cotangents."""

    @jax.jit
    def run(arrays, cotangents):
        value, pull = jax.vjp(function, arrays)
        return value, pull(cotangents)[0]

    wave = lambda x: np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
    cotangents = jax.tree.map(wave, jax.eval_shape(function, arrays))
    return jax.tree.map(np.asarray, run(arrays, cotangents))


def _in_float64(function: Callable[[Any], Any], arrays: Any) -> Any:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return _with_gradients(function, jax.tree.map(np.float64, arrays))


def attentions(small: bool) -> Iterator[Row]:
    """A layer of each tower at B/16's width, by XLA and by the fused implementation of this device."""
    heads, image, text = (2, 18, 32) if small else (12, 198, 96)  # cuDNN wants even lengths
    ids = np.sort(np.random.default_rng(1).integers(0, 4, (4, text))).astype(np.int32)
    yield from _attention("image", heads, image, None)
    yield from _attention("text", heads, text, ids)


def _attention(tower: str, heads: int, length: int, ids: np.ndarray | None) -> Iterator[Row]:
    width, eps, fused = 64 * heads, 1e-6, FUSED[jax.devices()[0].platform]
    init, bias = layers.normal(width**-0.5), layers.normal(0.1)
    x = np.random.default_rng(0).normal(size=(4, length, width)).astype(np.float32)
    within = None if ids is None else attention.CausalWithin(jnp.asarray(ids))

    def layer(program: str, dtype: str) -> attention.Attention:
        return attention.Attention(width, heads, jnp.dtype(dtype), init, init, bias, eps, program=program)

    variables = jax.jit(layer("xla", "float32").init)(jax.random.key(0), x, x, x)
    arrays = sharding.unbox(variables)["params"], x
    expected = _in_float64(lambda a: replicas.layer(*a, heads, eps=eps, ids=ids, causal=True), arrays)
    for program, dtype in (("xla", "float32"), ("xla", "bfloat16"), (fused, "bfloat16")):
        mask = within.mask() if within and program == "xla" else within
        apply = functools.partial(layer(program, dtype).apply, mask=mask)
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            got = _with_gradients(lambda a, f=apply: f({"params": a[0]}, a[1], a[1], a[1]), arrays)
        error = layer_trials.relative_error(got, expected)
        yield _error(f"attention, {tower}: {program}, {dtype}", error, BOUNDS[dtype])


def loss_terms(small: bool) -> Iterator[Row]:
    """Every contrastive loss and the box loss, and the gradients of all of them together."""
    outputs, batch = replicas.example(*((16, 32) if small else (128, 512)))
    config = config_lib.Loss(image_description=1.0, box_description=1.0)
    ours = _with_gradients(lambda x: losses.total_loss(x, batch, config).terms, outputs)
    theirs = _in_float64(lambda x: replicas.losses(x, batch), outputs)
    for name, expected in theirs[0].items():
        yield _error(f"loss: {name}", abs(ours[0][name] / expected - 1), BOUNDS["float32"])
    by_array = lambda grads: [(x,) for x in jax.tree.leaves(grads)]
    error = layer_trials.relative_error(by_array(ours[1]), by_array(theirs[1]))
    yield _error("loss: gradients of all", error, BOUNDS["float32"])


def step(size: str, batch: int) -> Iterator[Row]:
    """The train step on the devices of this machine, `batch` images on each, beside the plan's bound."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    on_all: dict[str, Any] = {"batch_size": batch * count, "mesh.data": count}
    config = our_step.make_config(size, batch, **on_all)
    mesh = sharding.make_mesh(config.mesh)
    program = train_step.build(config, mesh, total_steps=1000, steps_per_epoch=100.0)
    compiled = program.step.lower(program.state, program.batch).compile()
    arrays = device.shard_batch(next(synthetic.batches(config)), program.batch_sharding)
    state = [program.init()]

    def call():
        state[0], metrics = compiled(state[0], arrays)
        return metrics

    seconds = layer_trials.median_seconds(call, 3.0)
    rate = flops.per_image(config).train * batch / seconds
    chip, peak = tune.chip_of(kind), flops.peak_flops(kind, config.dtype)
    best = most = f"- (plan does not know {kind})"
    if chip:  # the plan of the program that was compiled here
        module, topology = hlo.parse(compiled.as_text()), chips.Topology(chip, count, (count,), 1)
        bound = plan.work(module, topology, config, dict(mesh.shape), {})
        best = f"plan: {bound['roofline']['step_s'] * 1e3:.4g} ms at best"
        most = f"plan: {bound['mfu_at_most']:.1%} at most"
    loss = float(call()["loss"])
    name = f"step: {size}, {count} x {batch} images, {config.dtype}"
    speed = f"{seconds * 1e3:.4g} ms, {config.batch_size / seconds:.4g} images/s, loss {loss:.4g}"
    yield Row(name, speed, best, bool(np.isfinite(loss)))
    share = f", {rate / peak:.1%}" if peak else f", - (peak of {kind} unknown)"
    yield Row("step: MFU", f"{rate / 1e12:.3g} TFLOP/s per device{share}", most)
    used = goodput.memory_of_devices()[1]
    measured = f"- ({kind} does not say)" if np.isnan(used) else f"{memory_check.gigabytes(used)} at its peak"
    needed = memory_check.gigabytes(sum(memory_check.step_bytes(compiled).values()))
    yield Row("step: memory per device", measured, f"plan: {needed}")


def resume(platform: str, steps: int, small: bool) -> Iterator[Row]:
    """`grain-jax train` killed half-way and started again, against a run that nothing disturbed."""
    keys = {"input.source": "synthetic", "total_steps": steps, "log_every": 1, "report_images": 0}
    keys |= {"checkpoint_every": max(1, steps // 5), "optim.warmup_steps": 2, "dtype": "auto"}
    if small:
        keys |= {f"model.{x}.depth": 1 for x in ("image", "text", "decoder")}
        keys["batch_size"] = 16
    environment = dict(os.environ)
    if platform == "gpu":  # else sums of a scatter have no fixed order
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = (epath.Path(folder) / name for name in ("alone", "killed"))

        def start(workdir: epath.Path) -> subprocess.Popen:
            words = ["--config=demo", f"--workdir={workdir}", "--coordinator=localhost:1"]  # no cluster
            words += [f"--config.{key}={value}" for key, value in keys.items()]
            return subprocess.Popen([sys.executable, "-m", "grain_jax.train", *words], env=environment)

        def finish(workdir: epath.Path) -> None:
            if status := start(workdir).wait():
                sys.exit(f"grain-jax train ended with status {status}")

        finish(alone)
        process, deadline = start(killed), time.monotonic() + PATIENCE
        while len(harness.lines(killed)) < steps // 2:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                sys.exit("grain-jax train ended, or did nothing, before it could be killed")
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(harness.lines(killed))
        finish(killed)
        pairs = list(zip(harness.lines(alone), harness.lines(killed)))
        equal = [a == b for a, b in pairs]
    name = f"resume: the demo's model, {steps} steps, killed at step {before}"
    measured = f"{sum(equal)} of {steps} steps equal to the bit, {len(pairs[0][0])} numbers each"
    yield Row(name, measured, "all", before < steps == sum(equal))


def main() -> int:
    """Prints and writes the table; the status is 1 if a check fails."""
    args = harness.arguments(
        __doc__,
        size=("B/16", dict(choices=recipe.SIZES)),
        batch=(128, dict(choices=our_step.PACKED_ROWS, help="images per device")),
        steps=50,
        output="first_run" + ".md",
        small=False,
    )
    if args.small:
        args.size, args.batch, args.steps = "tiny", 8, 12
    platform, kind = harness.device()
    environment = harness.machine("jax", "jaxlib", "flax", "optax", about=kind)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [f"{kind}, {environment['processor']}, {versions}:", ""]
    lines += ["| check | measured | expected | |", "|---|---|---|---|"]
    print(*lines[2:], sep="\n")
    # The runs come first: a TPU belongs to one process, and this one takes it at its first array.
    checks = resume(platform, args.steps, args.small), attentions(args.small), loss_terms(args.small)
    rows = []
    for row in itertools.chain(*checks, step(args.size, args.batch)):
        rows.append(row)
        print(row, flush=True)
    epath.Path(args.output).write_text("\n".join([*lines, *map(str, rows)]) + "\n")
    harness.write(args.json, dict(machine=environment, device=kind, rows=[r._asdict() for r in rows]))
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
