"""Compiles the train step for chips that are not here: libtpu for TPUs, the CUDA plugin of JAX for GPUs."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import topologies

from grain_jax import config as config_lib
from grain_jax.core import errors, progress
from grain_jax.launch import chips, schedule
from grain_jax.train import memory_check, sharding, train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# A GPU finds out whether cuBLAS or Triton multiplies faster; without one, only cuBLAS compiles. slurm.sbatch
# and the Dockerfile ask for the same scheduler.
_GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    " --xla_gpu_enable_latency_hiding_scheduler=true"
)
_CUDA_PLUGINS = {"jax_cuda12_plugin": "jax-cuda12-plugin", "jax_cuda13_plugin": "jax-cuda13-plugin"}
_PACKAGES = ("jax", "libtpu", *_CUDA_PLUGINS.values(), "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

_MEMORY = dict(arguments="argument_size", output="output_size", aliased="alias_size")
_MEMORY |= dict(temporaries="temp_size", code="generated_code_size", peak="peak_memory")


class CompilerFailed(errors.UserError):
    """The compiler refused the program, for a reason other than memory; one line."""

    status = 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of compiling a step; bytes are of one chip."""

    state_bytes: dict[str, int]  # arguments: parameters, moments, ema, batch (before padding to tiles)
    # `memory_analysis`: arguments, output, aliased, temporaries, code, peak; empty if out of memory.
    memory: dict[str, int]
    out_of_memory: str | None  # the compiler's message
    program: str  # hash of the StableHLO that was compiled
    hlo: str  # the compiled program as text; empty if out of memory
    mesh: dict[str, int]  # sizes of its axes
    versions: dict[str, str]  # of JAX and of the compilers that are installed
    # Of Pallas kernels for which libtpu wrote a schedule, by name.
    cycles: dict[str, int] = dataclasses.field(default_factory=dict)


def compile_step(
    config: config_lib.Config, topology: chips.Topology, *, total_steps: int, steps_per_epoch: float
) -> Compiled:
    """Compiles the step that `train` runs on that topology; needs no chip. `jax_platforms` has to be "cpu".

    Args:
      config: the run.
      topology: TPU slices or GPU nodes.
      total_steps, steps_per_epoch: of the run; the learning rate's schedule is part of the program.

    Raises:
      UserError: the compiler is missing, the mesh does not fit, or there is no such slice.
      CompilerFailed: the compiler refuses the program.
    """
    check_installed(topology.chip)
    with _environment(topology):
        try:
            devices = topologies.get_topology_desc(**_options(topology)).devices
        except jax.errors.JaxRuntimeError as error:
            first = str(error).splitlines()[0]
            raise errors.UserError(f"--topology: no such topology: {first}") from None
        mesh = sharding.make_mesh(config.mesh, devices)
        program = train_step.build(config, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        lowered = program.step.lower(program.state, program.batch)
        memory, out_of_memory, hlo, cycles = {}, None, "", {}
        name = topology.chip.name.upper()
        with progress.while_compiling(f"for {name}", "usually one to five minutes"):
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                out_of_memory = str(error)
                if "RESOURCE_EXHAUSTED" not in out_of_memory:
                    first = out_of_memory.splitlines()[0]
                    raise CompilerFailed(f"{name}: this program cannot be compiled: {first}") from None
            else:
                analysis, hlo = compiled.memory_analysis(), compiled.as_text()
                cycles = schedule.read(_dump(), hlo)
                memory = {name: getattr(analysis, f"{key}_in_bytes") for name, key in _MEMORY.items()}
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return Compiled(
        state_bytes=memory_check.state_bytes(program),
        memory=memory,
        out_of_memory=out_of_memory,
        program=hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        hlo=hlo,
        mesh=dict(mesh.shape),
        versions={name: installed[name] for name in _PACKAGES if name in installed},
        cycles=cycles,
    )


def check_installed(chip: chips.Chip) -> None:
    """Raises UserError, with what to install, if the compiler for that chip is missing."""
    needed, extra = (("libtpu",), "tpu") if chip.is_tpu else (_CUDA_PLUGINS, "cuda12")
    if not any(importlib.util.find_spec(package) for package in needed):
        raise errors.UserError(
            f"grain-jax plan: the compiler for {chip.name} is missing (Linux on x86_64; no such chip is"
            f' needed); pip install "grain_jax[{extra}]"'
        )


@contextlib.contextmanager
def _environment(topology: chips.Topology) -> Iterator[None]:
    """Sets the environment variables that the compiler reads."""
    # The user's flags come last, so that they win.
    variables = {"XLA_FLAGS": f"{_GPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()}
    if topology.chip.is_tpu:
        prefix, cores = topology.chip.libtpu
        variables = {
            "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
            "TPU_ACCELERATOR_TYPE": f"{prefix}-{math.prod(topology.shape) * cores}",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened: several may compile at once
            "LIBTPU_INIT_ARGS": f"{schedule.flags(_dump())} {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip(),
        }
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for file in _dump().iterdir():
            file.unlink()


@functools.cache
def _dump() -> epath.Path:
    """The folder for schedules: one for the process, since libtpu reads its flags once."""
    folder = tempfile.mkdtemp(prefix="grain-jax-plan-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return epath.Path(folder)


def _options(topology: chips.Topology) -> dict[str, Any]:
    """The arguments of `get_topology_desc`."""
    if not topology.chip.is_tpu:
        return {
            "platform": "cuda",
            "target_config": topology.chip.gpu.description(topology.chip.device_kind),
            "topology": f"1x{topology.slices}x{topology.shape[0]}",  # nodes, GPUs of a node
        }
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    options: dict[str, Any] = {"platform": "tpu", "topology_name": name}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real machine
    if min(topology.shape[:2]) < 2:  # less than a host's 2 x 2 chips
        bounds = [min(n, 2) for n in topology.shape]
        options["chips_per_host_bounds"] = bounds + [1] * (3 - len(bounds))
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    return options


def _bytes(text: str) -> int:
    """The bytes of a size as the compiler prints it, such as 18.29G."""
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)i?B?", text.strip()).groups()
    return round(float(number) * _UNITS[unit])


def parse_out_of_memory(message: str) -> tuple[int, int, list[tuple[int, str, str]]]:
    """Reads the message of RESOURCE_EXHAUSTED: an early one of libtpu, or one of its buffer assignment.

    Returns:
      (bytes needed, bytes there are, [(bytes, shape, operation) of the largest allocations, if named]).

    Raises:
      CompilerFailed: it was another memory than HBM.
    """
    sizes = re.search(
        r"HLO temporaries \(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message
    ) or re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    if not sizes:
        raise CompilerFailed(f"the compiler ran out of memory: {message.splitlines()[0]}")
    largest = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
        name = re.search(r'op_name="([^"]*)"', entry)
        facts = (part[1] if part else "?" for part in (shape, name))
        largest.append((_bytes(entry.split()[0]), *facts))
    return _bytes(sizes[1]), _bytes(sizes[2]), largest
