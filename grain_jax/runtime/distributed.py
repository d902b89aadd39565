"""Joins the processes of a run, and ends them all soon after one fails.

Flags, SLURM, Kubernetes or TPU metadata say who they are; JAX detects all but flags.
"""

import contextlib
import importlib.util
import os
import platform
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from grain_jax.core import errors
from grain_jax.runtime import ending

START_SECONDS = 300  # between the starts of the first and the last process: pods pull images
# What JAX reads under srun; a shell inside `salloc` or a batch script has only some of them.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_GKE_TPU = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def initialize(coordinator: str | None, processes: int, process_id: int, heartbeat_seconds: int) -> str:
    """Joins the other processes, where there are any. Call it before anything that asks for devices.

    Args:
      coordinator: HOST:PORT of process 0, or None to look for a cluster.
      processes: how many there are; with a coordinator.
      process_id: which of them this is, from 0; with a coordinator.
      heartbeat_seconds: silence after which a process counts as dead and the others end; at least 1.

    Returns:
      What was found, for this process's log: "SLURM job 12: process 1 of 4, on node3" or "a single process".

    Raises:
      UserError: flags that do not fit together, or a package that the cluster needs is missing.
    """
    cluster = find(coordinator, processes, process_id, os.environ)
    if cluster is None:
        return "a single process"
    name, arguments = cluster
    waits = f"{name}: waiting for the other processes"
    patience = threading.Timer(10, print, [waits], dict(file=sys.stderr, flush=True))
    patience.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=heartbeat_seconds
        )
        alone = jax.process_count() == 1
        ending.take_sigterm_back(leaves_last=jax.process_index() == 0 and not alone)
        if alone:  # a cluster of one: its own heartbeat could only end it
            jax.distributed.shutdown()
    finally:
        patience.cancel()
    return f"{name}: process {jax.process_index()} of {jax.process_count()}, on {socket.gethostname()}"


def find(
    coordinator: str | None, processes: int, process_id: int, environment: Mapping[str, str]
) -> tuple[str, dict[str, Any]] | None:
    """(name of the cluster, arguments of `jax.distributed.initialize`), or None for a process that is alone.

    Args:
      coordinator, processes, process_id: see `initialize`.
      environment: variables, after JAX was imported (it notes there whether the machine has TPU chips).

    Raises:
      UserError: see `initialize`.
    """
    if coordinator is None:
        if processes != 1 or process_id != 0:
            raise errors.UserError(
                f"--coordinator: missing, with --processes={processes} --process-id={process_id}; expected"
                " HOST:PORT of process 0, or none of the three"
            )
        return _find_cluster(environment)
    if not re.fullmatch(r".+:\d+", coordinator):
        raise errors.UserError(
            f"--coordinator: got {coordinator!r}, expected HOST:PORT of process 0, such as 10.0.0.1:8476"
        )
    if not 0 <= process_id < processes:
        raise errors.UserError(
            f"--process-id: got {process_id} with --processes={processes}, expected 0 to --processes - 1"
        )
    if processes == 1:
        return None
    return f"coordinator {coordinator}", dict(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process_id,
        cluster_detection_method="deactivate",
    )


def _find_cluster(environment: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    if all(name in environment for name in _SLURM):
        if int(environment["SLURM_NTASKS"]) == 1:
            return None
        arguments: dict[str, Any] = dict(cluster_detection_method="slurm")
        if devices := _gpus_of_task(environment):
            arguments["local_device_ids"] = devices
        return f"SLURM job {environment['SLURM_JOB_ID']}", arguments

    cpu_only = environment.get("JAX_PLATFORMS") == "cpu"
    hosts = next((environment[name] for name in _GKE_TPU if name in environment), None)
    if hosts and not cpu_only:
        slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
        many = "," in hosts or slices > 1
        return ("GKE's TPU slice", dict(cluster_detection_method="gketpu")) if many else None
    if "KUBERNETES_SERVICE_HOST" in environment:
        if "JOB_COMPLETION_INDEX" not in environment:
            return None  # a pod that is no part of an indexed job
        if importlib.util.find_spec("kubernetes") is None:
            raise errors.UserError(
                "Kubernetes: this is a pod of an indexed job, and JAX asks its API who the others are:"
                " pip install 'jax[k8s]', or give --coordinator, --processes and --process-id"
            )
        return "Kubernetes", dict(cluster_detection_method="k8s")
    if "TPU_SKIP_MDS_QUERY" in environment or cpu_only:
        return None  # JAX sets it where there are no TPU chips
    return "TPU metadata", dict(cluster_detection_method="gcetpu")


def _gpus_of_task(environment: Mapping[str, str]) -> list[int]:
    """The GPUs of a SLURM task, among those that it sees; [] leaves the choice to JAX.

    JAX takes one GPU, with the number of the task on its node. That is right only where the tasks of a node
    see the same GPUs, as many as there are tasks.

    Raises:
      UserError: the tasks of a node see the same GPUs, and there is not one for each task.
    """
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    tasks = int(environment["SLURM_NTASKS"]) / int(environment.get("SLURM_STEP_NUM_NODES", 1))
    bound = environment.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2] == str(len(visible))
    if tasks <= 1 or bound:
        return list(range(len(visible)))
    if visible and len(visible) != tasks:
        raise errors.UserError(
            f"SLURM: {tasks:g} tasks on a node see the same {len(visible)} GPUs"
            f" (CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']}); expected one task a node, a task"
            " for each GPU, or srun --gpus-per-task"
        )
    return []


def keep_compiled_programs() -> None:
    """Turns JAX's cache of compiled programs on, in the user's cache: the next start compiles nothing.

    `JAX_COMPILATION_CACHE_DIR` names another folder. Each host has one, since XLA compiles for its processor.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "grain_jax" / "compiled" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX warns of an entry that it cannot read or write, and compiles.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


@contextlib.contextmanager
def ending_together(heartbeat_seconds: int) -> Iterator[None]:
    """Ends the process at once where the code inside fails, so that the other processes soon end too.

    An ordinary exit waits for all processes, up to five minutes, and still sends heartbeats: the others would
    stand in a collective all the while. The statuses of `ending.AGREED` are ordinary exits.

    Args:
      heartbeat_seconds: as given to `initialize`.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        status, text = ending.end_by(error)
        if isinstance(error, SystemExit) and status in ending.AGREED:
            raise
        # Another process is gone; JAX finds out which, and ends this one.
        if "Gloo" in str(error) and not isinstance(error, errors.UserError):
            said = f"a collective failed, so another process may be gone: {error}"
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(said, file=sys.stderr)
            time.sleep(heartbeat_seconds + 5)
            text = ""
        ending.leave(status, text)
