"""Chooses the program of attention where a run runs: times two layers of each tower with each program.

The program that `auto` takes stays if its results are XLA's and it is no slower; else XLA's is taken. Process
0 decides for all, and WORKDIR/programs.json keeps the choice for a resume.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import atomic, progress
from grain_jax.models import attention, placement, towers
from grain_jax.runtime import processes
from grain_jax.train import forward, set_up, sharding

TOWERS = {"image": towers.image_tower, "text": towers.text_tower}
TOLERANCE = 2e-2  # of results in bfloat16
_LAYERS, _TEXT = 2, 16  # layers that are timed, tokens of a text
_COMPILERS = re.compile(r"jax.*|libtpu|nvidia-cudnn.*")  # packages


class Trial(NamedTuple):
    """Layers of a tower with a program."""

    seconds: float = math.inf  # per layer, forward and backward
    error: float = math.nan  # of output and gradients, relative to XLA's
    fault: str = ""  # why the program cannot be taken


def median_seconds(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """The median time of a call that returns JAX's arrays, after two that warm up; takes about `seconds`."""
    jax.block_until_ready(call())
    calls, took = 1, []
    for part in range(6):
        began = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)][-1])
        took.append((time.perf_counter() - began) / calls)
        if part == 0:
            calls = max(1, round(seconds / 5 / took.pop()))
    return statistics.median(took)


def with_attention(config: config_lib.Config, program: str) -> config_lib.Config:
    """The config with this value of `model.attention`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=program))


def taken_by_auto(config: config_lib.Config, mesh: jax.sharding.Mesh) -> str:
    """The program that `model.attention=auto` takes on this mesh; "" if it is XLA's, or the key is fixed."""
    with _as_in_a_run(mesh):
        taken = attention.of_towers(config.model, config.dtype)
    return taken if config.model.attention == "auto" and taken != "xla" else ""


def compare(config: config_lib.Config, tower: str, images: int, choices: Sequence[str]) -> list[Trial]:
    """Tries values of `model.attention` on one device of this process.

    Args:
      config: of a run, without open numbers.
      tower: "image" or "text".
      images: that a device sees at once.
      choices: the first is XLA's, and the results of the others are compared with its results.
    """
    trials, expected = [], None
    arguments = _arguments(config, tower, images)
    for choice in choices:
        try:
            step = _step(with_attention(config, choice), tower)
            results = step(*arguments)
            expected = results if expected is None else expected
            error = relative_error(results, expected)
            fault = "" if error <= TOLERANCE else f"differs by {error:.1e}"
            seconds = median_seconds(functools.partial(step, *arguments)) / _LAYERS
            trials.append(Trial(seconds, error, fault))
        except Exception as raised:  # whatever a compiler or a kernel raises
            trials.append(Trial(fault=(str(raised).strip() or repr(raised)).splitlines()[0]))
    return trials


def relative_error(results: Any, expected: Any) -> float:
    """The largest norm of a difference to the expected norm, of the arrays of each module together.

    A module counts as 1% of all at least: some gradients are zero but for rounding.
    """
    norms: dict[Any, jax.Array] = {}  # module -> the squares of both
    of_all = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(results))
    for (path, x), y in of_all:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        squares = jnp.stack([jnp.sum((x - y) ** 2), jnp.sum(x * x)])
        norms[path[:-1]] = norms.get(path[:-1], 0) + squares
    differences, wanted = jnp.sqrt(jnp.stack([*norms.values()])).T
    return float(jnp.max(differences / jnp.maximum(wanted, 0.01 * jnp.linalg.norm(wanted))))


def _as_in_a_run(mesh: jax.sharding.Mesh | None = None) -> contextlib.AbstractContextManager[None]:
    """Inside, towers choose their programs as in a run, by default on one device."""
    mesh = mesh or sharding.make_mesh(config_lib.Mesh(data=1), jax.local_devices()[:1])
    return placement.on(mesh, sharding.BATCH_AXES)


def _tower(config: config_lib.Config, tower: str) -> Any:
    """The module of a tower with two layers."""
    full, model = getattr(config.model, tower), config.model
    short = dataclasses.replace(full, depth=_LAYERS, unroll=min(full.unroll, _LAYERS))
    dtype = jnp.dtype(config.dtype)
    return TOWERS[tower](full)(short, dtype, config.remat, model.attention, config.optim.lora.scale)


def _step(config: config_lib.Config, tower: str) -> Callable[..., Any]:
    """The jitted function of `_arguments`: the layers' output and their parameters' gradients."""
    module = _tower(config, tower)

    def loss(params, cotangent, inputs, options):
        out = module.apply({"params": params}, *inputs, **options)
        return jnp.vdot(out.astype(jnp.float32), cotangent), out

    @jax.jit
    def step(*arguments):
        with _as_in_a_run():
            (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(*arguments)
        return out, gradients

    return step


def _arguments(config: config_lib.Config, tower: str, images: int) -> tuple[Any, ...]:
    """(parameters, cotangent of the output, inputs, keywords) of a tower for random images."""
    keys, options = iter(jax.random.split(jax.random.key(0), 3)), {}
    if tower == "image":
        size, kept = config.model.image.image_size, forward.patches_seen(config)
        inputs = (jax.random.normal(next(keys), (images, size, size, 3)),)
        if config.model.image.keep != 1:
            options = {"kept": jnp.broadcast_to(jnp.arange(kept), (images, kept))}
    else:
        group, rows = config.text_layout
        at = jnp.broadcast_to(jnp.arange(config.row_length), (images // group, rows, config.row_length))
        tokens = jax.random.randint(next(keys), at.shape, 1, config.model.text.vocab_size)
        inputs = (tokens, at % _TEXT, 1 + at // _TEXT)
    module = _tower(with_attention(config, "xla"), tower)
    with _as_in_a_run():
        init = jax.jit(functools.partial(module.init, **options))
        params = sharding.unbox(init(next(keys), *inputs)["params"])
        out = jax.eval_shape(module.apply, {"params": params}, *inputs, **options)
    return params, jax.random.normal(next(keys), out.shape), inputs, options


def images_at_once(config: config_lib.Config, mesh: jax.sharding.Mesh) -> int:
    """The images of a micro-batch on a device."""
    return config.batch_size // (sharding.batch_shards(mesh) * config.microbatches)


def choose(run: set_up.SetUp, workdir: epath.Path) -> set_up.SetUp:
    """The run with XLA's program in place of that of `auto` if it is wrong, slower or does not run.

    Nothing is measured where `auto` takes XLA's, as on CPUs.
    """
    config, path = run.config, workdir / "programs.json"
    taken, images = taken_by_auto(config, run.mesh), images_at_once(config, run.mesh)
    if not taken:
        return run
    device = jax.devices()[0].device_kind
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    key = {
        "device": device,
        "versions": {k: v for k, v in sorted(installed.items()) if _COMPILERS.fullmatch(k)},
        "shapes": [images, *config.text_layout, config.row_length],
        "others": [taken, config.dtype, config.remat, config.optim.lora.rank],
        "model": json.loads(config_lib.to_json(config))["model"],
    }

    def decide() -> tuple[str, str]:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            stored = json.loads(path.read_text())
            if stored["key"] == key:
                return stored["attention"], f"{stored['line']} (as in {path})"
        with progress.while_compiling("layers with each program", "usually under a minute"):
            program, words = _decide(config, images, taken)
        stored = {"line": f"programs on {device}: {words}", "attention": program, "key": key}
        atomic.write_text(path, json.dumps(stored, indent=2) + "\n")
        return program, stored["line"]

    program, line = processes.of_first(decide)
    set_up.tell(line)
    return run._replace(config=with_attention(config, program))


def _decide(config: config_lib.Config, images: int, taken: str) -> tuple[str, str]:
    """The value of `model.attention`, and the choice in words; `taken` is the program of `auto`."""
    plain, auto = zip(*(compare(config, tower, images, ("xla", "auto")) for tower in TOWERS))
    depths = [getattr(config.model, tower).depth for tower in TOWERS]
    least, seconds = (sum(d * t.seconds for d, t in zip(depths, x)) for x in (plain, auto))
    times = f"{seconds * 1e3:.3g} ms, xla {least * 1e3:.3g} ms"
    if fault := next((t.fault for t in auto if t.fault), f"slower, {times}" * (seconds > least)):
        return "xla", f"attention xla ({taken}: {fault})"
    return "auto", f"attention {taken} ({times})"
