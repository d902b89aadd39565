"""Compares the memory that a training step needs with what there is: a step that does not fit is one line."""

import contextlib
import math
import os

import jax
from etils import epath

from grain_jax.core import errors
from grain_jax.train import train_step

ADVICE = (
    "for fewer activations raise --config.microbatches or set --config.remat=full; for a smaller state on"
    " each device raise --config.mesh.fsdp"
)


def host_bytes(root: epath.PathLike = "/") -> int:
    """Bytes of memory of this machine, or of the container that the process is in."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    root = epath.Path(root)
    names = ["sys/fs/cgroup/memory/memory.limit_in_bytes"]  # version 1
    with contextlib.suppress(OSError, StopIteration):  # version 2: each group above has its own
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        group = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        parts = [part for part in group.split("/") if part]
        groups = ["/".join(["sys/fs/cgroup", *parts[:n]]) for n in range(len(parts) + 1)]
        names += [f"{path}/memory.max" for path in groups]
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            sizes.append(int((root / name).read_text()))
    return min(sizes)


def device_bytes() -> int:
    """Bytes that the arrays on one device may take; the CPU devices of a process share its memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_bytes() // jax.local_device_count()


def state_bytes(program: train_step.Program) -> dict[str, int]:
    """Bytes per device of the arguments of a program, by kind, before any padding."""
    state, shardings = program.state, program.shardings
    kinds = {
        "parameters": (state.params, shardings.params),
        "moments": (state.opt_state, shardings.opt_state),
        "ema": (state.ema_params, shardings.ema_params),
        "batch": (program.batch, jax.tree.map(lambda _: program.batch_sharding, program.batch)),
    }
    size = lambda x, cut: math.prod(cut.shard_shape(x.shape)) * x.dtype.itemsize
    return {kind: sum(map(size, *map(jax.tree.leaves, trees))) for kind, trees in kinds.items()}


def check(program: train_step.Program) -> None:
    """Checks the state and one batch, before the state is made. Raises OutOfMemory."""
    sizes = state_bytes(program)
    batch = sizes.pop("batch")
    _compare({"parameters, moments and averages": sum(sizes.values()), "a batch (batch_size)": batch})


def step_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes per device that a compiled step needs, by kind; {} if its compiler does not say."""
    usage = compiled.memory_analysis()
    if usage is None:
        return {}
    written = usage.output_size_in_bytes - usage.alias_size_in_bytes
    arguments = usage.argument_size_in_bytes + usage.generated_code_size_in_bytes
    return {"state and batch": arguments + written, "activations": usage.temp_size_in_bytes}


def check_step(compiled: jax.stages.Compiled) -> None:
    """Checks the compiled step by the figures of its compiler. Raises OutOfMemory."""
    _compare(step_bytes(compiled))


def _compare(needs: dict[str, int]) -> None:
    total, limit = sum(needs.values()), device_bytes()
    if total > limit:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in needs.items())
        raise errors.OutOfMemory(
            f"out of memory: the step needs {gigabytes(total)} on each device ({parts}), a device has"
            f" {gigabytes(limit)}; {ADVICE}"
        )


def gigabytes(count: float) -> str:
    """Bytes in words: "315.4 GB", "12.0 MB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
