"""Compiles the train step for chips that this machine does not have, in a child process, and caches the result.

For TPUs libtpu compiles, for GPUs the CUDA plugin of JAX. Only the child loads them, so that their crash is one
line here. Results are cached in $GRAIN_JAX_CACHE
(~/.cache/grain_jax/plan) by the text of the program, so that the same plan compiles once.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import errors, named, progress
from grain_jax.launch import chips

ROOT = epath.Path(errors.__file__).resolve().parents[2]  # the child finds grain_jax there

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Of the cuBLAS and Triton versions of a product, the one that is faster is found on a GPU: without one, cuBLAS is
# what compiles. The scheduler is the one that slurm.sbatch and the Dockerfile ask for.
_GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    " --xla_gpu_enable_latency_hiding_scheduler=true"
)
_CUDA_PLUGINS = {"jax_cuda12_plugin": "jax-cuda12-plugin", "jax_cuda13_plugin": "jax-cuda13-plugin"}
# Variables that change what the compiler makes of the same program.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# What compiles for a platform.
_PACKAGES = {
    "tpu": ("libtpu",),
    "cuda": (*_CUDA_PLUGINS.values(), "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
}


class TookTooLong(errors.UserError):
    """A compile that ran out of its time; one line."""


class CompilerFailed(RuntimeError):
    """The compiler crashed or refused the program, for a reason other than memory; one line."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of compiling a step; bytes are of one chip.

    Attributes:
      state_bytes: of the arguments by kind: parameters, moments, ema, batch (before padding to tiles), scalars.
      checkpoint_bytes: of what a checkpoint holds, all chips together.
      memory: `memory_analysis`: arguments, output, aliased, temporaries, code, peak; empty if out of memory.
      traced_flops: matrix products of the step as written, recomputation included, all chips together.
      out_of_memory: the compiler's message, or None.
      program: hash of the StableHLO that was compiled.
      hlo: the compiled program as text; empty if out of memory.
      mesh: sizes of the mesh's axes.
      versions: of jax and of libtpu, or of the CUDA plugin and cuDNN.
      seconds: that the compile took.
      cached: whether this answer was at hand.
    """

    state_bytes: dict[str, int]
    checkpoint_bytes: int
    memory: dict[str, int]
    traced_flops: int
    out_of_memory: str | None
    program: str
    hlo: str
    mesh: dict[str, int]
    versions: dict[str, str]
    seconds: float
    cached: bool = False


def compile_step(
    config: config_lib.Config,
    topology: chips.Topology,
    *,
    total_steps: int,
    steps_per_epoch: float,
    phase: tuple[int, int | None] | None = None,
    timeout: float,
    line: progress.Line,
) -> Compiled:
    """Compiles the step that `train` runs on that topology; needs no chip.

    Args:
      config: the run.
      topology: TPU slices or GPU nodes.
      total_steps, steps_per_epoch: of the run; the learning rate's schedule is part of the program.
      phase: the key of the phase whose program it is (training.phases.Phase); None: that which computes most.
      timeout: seconds that it may take.
      line: shows the progress.

    Raises:
      UserError: the compiler is missing, the mesh does not fit, there is no such slice, or time ran out.
      CompilerFailed: the compiler crashed.
    """
    if what := missing(topology.chip):
        raise errors.UserError(f"grain-jax plan: {what}")
    is_tpu = topology.chip.is_tpu
    nodes = () if is_tpu or topology.slices == 1 else (topology.slices,)
    name = f"{topology.chip.name}:{'x'.join(map(str, (*topology.shape, *nodes)))}"
    chosen = os.environ.get("GRAIN_JAX_CACHE")
    cache = epath.Path(chosen or "~/.cache/grain_jax/plan").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    request = dict(
        config=json.loads(config_lib.to_json(config)),
        platform="tpu" if is_tpu else "cuda",
        topology=name,
        options=_topology_options(topology),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        phase=phase,
        cache=str(cache.resolve()),
    )
    # Whole tracebacks: their last line is what went wrong.
    told = {"JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}
    variables = {**os.environ, **told, **_environment(topology)}
    out, log, status = _run(json.dumps(request), variables, timeout, f"compiling for {name}", line)
    try:
        answer = json.loads(out.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise CompilerFailed(_crash(status, log, config, name, topology.chip)) from None
    if "fault" in answer:
        raise errors.UserError(answer["fault"])
    if "failed" in answer:
        raise CompilerFailed(
            f"{'libtpu' if is_tpu else 'XLA'} cannot compile this program for {name}: {answer['failed']}"
        )
    facts = json.loads(gzip.decompress(epath.Path(answer["path"]).read_bytes()))
    return Compiled(**facts | {"cached": answer["cached"]})


def missing(chip: chips.Chip) -> str | None:
    """What must be installed before a step can be compiled for that chip, in one line; None: nothing."""
    needed = ("libtpu",) if chip.is_tpu else _CUDA_PLUGINS
    if any(importlib.util.find_spec(package) for package in needed):
        return None
    if chip.is_tpu:
        what, extra = "libtpu is missing, expected the TPU compiler (Linux on x86_64; no TPU", "tpu"
    else:
        what = "the CUDA plugin of JAX is missing, which compiles for GPUs (Linux; no GPU"
        extra = "cuda12"
    return f'{what} is needed); pip install "grain_jax[{extra}]"'


def versions_of(*platforms: str) -> dict[str, str]:
    """Package -> version of what compiles for "tpu" or "cuda", as far as it is installed."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    wanted = [name for platform in platforms for name in _PACKAGES[platform]]
    return {name: found[name] for name in wanted if name in found}


def _environment(topology: chips.Topology) -> dict[str, str]:
    """The variables that the compiler reads."""
    if not topology.chip.is_tpu:
        # The flags of the user come last, so that they win.
        return {"XLA_FLAGS": f"{_GPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()}
    prefix, cores = topology.chip.libtpu
    return {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": f"{prefix}-{math.prod(topology.shape) * cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened, so that several may compile at once
    }


def _topology_options(topology: chips.Topology) -> dict[str, Any]:
    """The arguments of `get_topology_desc` besides the name of a TPU slice."""
    if not topology.chip.is_tpu:
        return {
            "target_config": topology.chip.gpu.description(topology.chip.device_kind),
            "topology": f"1x{topology.slices}x{topology.shape[0]}",  # nodes, GPUs of a node
        }
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real machine
    if min(topology.shape[:2]) < 2:  # less than a host's 2 x 2 chips
        bounds = [min(n, 2) for n in topology.shape]
        options["chips_per_host_bounds"] = bounds + [1] * (3 - len(bounds))
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    return options


def _run(
    request: str, environment: dict[str, str], timeout: float, what: str, line: progress.Line
) -> tuple[str, str, int]:
    """(stdout, stderr, status) of the child; prints progress."""
    began = time.monotonic()
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = [sys.executable, "-m", "grain_jax.launch.compiler"]
    options = dict(cwd=ROOT, env=environment, text=True, errors="replace", **pipes)
    with subprocess.Popen(command, **options) as child:
        given: str | None = request
        try:
            while (spent := time.monotonic() - began) < timeout:
                line.show(f"{what} ... {progress.duration(spent)}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, log = child.communicate(given, timeout=min(1.0, timeout - spent))
                    return out, log, child.returncode
                given = None  # the child has it
        finally:
            child.kill()
    raise TookTooLong(
        f"--timeout: {what} took more than {timeout:.0f} s; give it more, or plan for fewer chips"
    )


def _crash(status: int, log: str, config: config_lib.Config, name: str, chip: chips.Chip) -> str:
    """The line for a child that ended without an answer."""
    if status < 0:
        how = f"crashed with {signal.Signals(-status).name}"
    else:
        last = next((line for line in log.strip().splitlines()[::-1] if line.strip()), "no message")
        how = f"ended with status {status}: {last.strip()}"
    mesh = config.mesh
    compiler, library = ("TPU", "libtpu") if chip.is_tpu else ("GPU", "jax[cuda12]")
    return (
        f"the {compiler} compiler {how} on {name} with mesh.fsdp={mesh.fsdp} mesh.tensor={mesh.tensor}"
        f" microbatches={config.microbatches} remat={config.remat}; this is the compiler's fault: try"
        f" another of these, or another {library}"
    )


def _bytes(text: str) -> int:
    """Of a size as the compiler prints it, such as 18.29G."""
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)i?B?", text.strip()).groups()
    return round(float(number) * _UNITS[unit])


def parse_out_of_memory(message: str) -> tuple[int, int, list[tuple[int, str, str]]]:
    """Reads the message of RESOURCE_EXHAUSTED: an early one of libtpu, or one of its buffer assignment.

    Returns:
      (bytes needed, bytes there are, [(bytes, shape, operation) of the largest allocations, if it names any]).

    Raises:
      CompilerFailed: it was another memory than HBM.
    """
    found = re.search(
        r"HLO temporaries \(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message
    ) or re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    if not found:
        raise CompilerFailed(f"the compiler ran out of memory: {message.splitlines()[0]}")
    largest = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
        name = re.search(r'op_name="([^"]*)"', entry)
        named = (part[1] if part else "?" for part in (shape, name))
        largest.append((_bytes(entry.split()[0]), *named))
    return _bytes(found[1]), _bytes(found[2]), largest


# What follows runs in the child.


def _child(request: dict[str, Any]) -> dict[str, Any]:
    """Lowers, looks into the cache, compiles; returns the answer for the parent."""
    import jax
    from jax.experimental import topologies

    from grain_jax.training import flops, memory_need, sharding, train_step

    with named.importing():  # the user's own config, from the command line of grain-jax plan
        config = config_lib.from_dict(request["config"])
    name, platform = request["topology"], request["platform"]
    of_slice = {"topology_name": name} if platform == "tpu" else {}
    try:
        devices = topologies.get_topology_desc(
            platform=platform, **of_slice, **request["options"]
        ).devices
    except jax.errors.JaxRuntimeError as error:
        compiler = "libtpu" if platform == "tpu" else "XLA"
        raise errors.UserError(
            f"--topology: {compiler} knows no {name}: {str(error).splitlines()[0]}"
        ) from None
    mesh = sharding.make_mesh(config.mesh, devices)
    lengths = {key: request[key] for key in ("total_steps", "steps_per_epoch")}
    program = train_step.build(config, mesh, **lengths)
    step, batch = program.step, program.batch
    if request["phase"] is not None:
        own = next(one for one in program.phases if one.key == tuple(request["phase"]))
        step, batch = own.step, own.batch
        program = program._replace(batch=batch)
    lowered = step.lower(program.state, batch)
    versions = {"jax": jax.__version__, **versions_of(platform)}
    flags = {flag: os.environ.get(flag) for flag in FLAGS}
    # An entry that was written with other fields is another entry.
    fields = [field.name for field in dataclasses.fields(Compiled)]
    identity = json.dumps([fields, name, request["options"], versions, flags], sort_keys=True)
    text = lowered.as_text()
    key = hashlib.sha256((identity + text).encode()).hexdigest()[:24]
    path = epath.Path(request["cache"]) / f"{key}.json.gz"
    if path.exists():
        return {"path": str(path), "cached": True}

    began = time.monotonic()
    memory, out_of_memory, hlo = {}, None, ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            return {"failed": str(error).splitlines()[0]}
        out_of_memory = str(error)
    else:
        analysis, hlo = compiled.memory_analysis(), compiled.as_text()
        memory = dict(
            arguments=analysis.argument_size_in_bytes,
            output=analysis.output_size_in_bytes,
            aliased=analysis.alias_size_in_bytes,
            temporaries=analysis.temp_size_in_bytes,
            code=analysis.generated_code_size_in_bytes,
            peak=analysis.peak_memory_in_bytes,
        )
    answer = Compiled(
        state_bytes=memory_need.state_bytes(program),
        checkpoint_bytes=memory_need.checkpoint_bytes(config, program),
        memory=memory,
        traced_flops=flops.matmul_flops(step, program.state, batch),
        out_of_memory=out_of_memory,
        program=hashlib.sha256(text.encode()).hexdigest(),
        hlo=hlo,
        mesh=dict(mesh.shape),
        versions=versions,
        seconds=time.monotonic() - began,
    )
    # By a rename: an entry that is there is whole, also where two processes make it.
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(answer)).encode(), 4))
    partial.replace(path)
    return {"path": str(path), "cached": False}


if __name__ == "__main__":
    try:
        told = _child(json.loads(sys.stdin.read()))
    except errors.UserError as error:
        told = {"fault": str(error)}
    print(json.dumps(told), flush=True)
