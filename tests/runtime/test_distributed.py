"""Who joins whom, by environment; and that a process that dies or fails ends the others, with a line."""

import importlib.util
import inspect
import os
import signal
import socket
import subprocess
import sys

import jax
import pytest
from jax._src import clusters

from grain_jax.core import errors
from grain_jax.runtime import distributed
from grain_jax.train import arguments as train
from tests.paths import ROOT

NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}
SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    **NO_TPU,
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", **NO_TPU}
SLICE = {**POD, "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "JOB_COMPLETION_INDEX": "0"}


_GKE = ("GKE's TPU slice", {"cluster_detection_method": "gketpu"})
_ALONE = {**SLICE, "TPU_WORKER_HOSTNAMES": "localhost"}


def _sees(gpus, tasks=1):
    """A task of `srun` on two nodes with so many tasks each, and the GPUs that it sees."""
    return {**SRUN, "SLURM_NTASKS": str(2 * tasks), "CUDA_VISIBLE_DEVICES": gpus}


def _job(**ids):
    return "SLURM job 12", {"cluster_detection_method": "slurm", **ids}


@pytest.mark.parametrize(
    "environment,expected",
    [
        (NO_TPU, None),
        (SRUN, _job()),
        (_sees("0,1,2,3"), _job(local_device_ids=[0, 1, 2, 3])),
        # A task for each of the node's GPUs, which every task sees: JAX takes that of the task's number.
        (_sees("0,1,2,3,4,5,6,7", tasks=8), _job()),
        (_sees("5", tasks=8), _job(local_device_ids=[0])),
        (_sees("4,5", tasks=2) | {"SLURM_GPUS_PER_TASK": "a100:2"}, _job(local_device_ids=[0, 1])),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, None),  # a shell of salloc
        (SLICE, _GKE),
        (_ALONE, None),
        ({**_ALONE, "MEGASCALE_NUM_SLICES": "2"}, _GKE),
        (POD, None),
        ({}, ("TPU metadata", {"cluster_detection_method": "gcetpu"})),
        ({"JAX_PLATFORMS": "cpu"}, None),  # a look at one machine of a pod
    ],
)
def test_what_the_environment_says(environment, expected):
    assert distributed.find(None, 1, 0, environment) == expected
    if expected:
        names = [cluster.name for cluster in clusters.ClusterEnv._cluster_types]
        assert expected[1]["cluster_detection_method"] in names


@pytest.mark.parametrize("tasks, gpus", [(8, 4), (2, 4)])
def test_slurm_tasks_that_share_their_gpus_are_refused(tasks, gpus):
    message = f"{tasks} tasks on a node see the same {gpus} GPUs"
    with pytest.raises(errors.UserError, match=message) as caught:
        distributed.find(None, 1, 0, _sees("0,1,2,3", tasks))
    assert str(caught.value).endswith("or srun --gpus-per-task") and caught.value.status == 2


def test_flags_win_over_the_environment():
    name, given = distributed.find("10.0.0.1:8476", 4, 3, SRUN)
    assert name == "coordinator 10.0.0.1:8476" and given == {
        "coordinator_address": "10.0.0.1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert distributed.find("10.0.0.1:8476", 1, 0, SRUN) is None  # nobody to wait for
    parsed = train.Train.parse(["--config=demo", "--workdir=w"])
    jaxs_own = inspect.signature(jax.distributed.initialize).parameters["heartbeat_timeout_seconds"]
    assert parsed.heartbeat_seconds == jaxs_own.default == 100


@pytest.mark.parametrize(
    "flags,fault",
    [
        ((None, 2, 0, 20), "--coordinator: missing"),
        (("10.0.0.1", 2, 0, 20), "--coordinator: got '10.0.0.1', expected HOST:PORT"),
        (("h:1", 2, 2, 20), "--process-id: got 2 with --processes=2"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, fault):
    with pytest.raises(errors.UserError) as caught:
        distributed.initialize(*flags)
    assert str(caught.value).startswith(fault) and "\n" not in str(caught.value)


_START = """
import sys, time
import jax.numpy as jnp
from jax.experimental import multihost_utils
from grain_jax.core import errors
from grain_jax.runtime import distributed, ending
port, me, heartbeat, flag = sys.argv[1], *map(int, sys.argv[2:])
"""
_WORKER = """
print(distributed.initialize(f"127.0.0.1:{port}", 2, me, heartbeat), file=sys.stderr)
with distributed.ending_together(heartbeat):
    multihost_utils.process_allgather(jnp.ones(1))
    print("up", flush=True)
    if flag:  # it fails
        raise errors.UserError("no such folder")
    while True:
        time.sleep(0.1)
"""


# Ends as it is told, in training or outside it; prints the call of `reached` at which it did, or each.
_LISTENER = """
handler = ending.PreemptionHandler()
handler.listen()
distributed.initialize(f"127.0.0.1:{port}", 2, me, heartbeat)
with distributed.ending_together(heartbeat):
    multihost_utils.process_allgather(jnp.ones(1))
    if flag:  # outside training
        print("up", flush=True)
        while True:
            time.sleep(0.1)
    with handler.training():
        print("up", flush=True)
        calls = 1
        while not handler.reached(calls):
            multihost_utils.process_allgather(jnp.ones(1))  # as a step does
            time.sleep(0.1)
            calls += 1
    print("reached", calls, flush=True)
    sys.exit(handler.status)
"""


def _pair(script=_WORKER, *, flags=(0, 0), heartbeat=10, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = []
    for me in range(processes):
        words = [sys.executable, "-c", _START + script, port, *map(str, (me, heartbeat, flags[me]))]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        environment = {**os.environ, "XLA_FLAGS": ""}
        pair.append(subprocess.Popen(words, cwd=ROOT, env=environment, **pipes))
    for process in pair:
        while "up" not in (line := process.stdout.readline()):  # Gloo prints there too
            assert line, process.stderr.read()
    return pair


def _ended_by(survivor, victim):
    """The survivor has ended within a minute, as JAX ends it."""
    said = survivor.communicate(timeout=60)[1]
    assert survivor.returncode == -signal.SIGABRT
    assert f"process {1 - victim} of 2, on {socket.gethostname()}" in said.splitlines()[0]
    assert "the JAX distributed service detected fatal errors" in said


@pytest.mark.slow
def test_one_that_fails_alone_does_not_wait_for_the_other_which_ends():
    pair = _pair(flags=(0, 1))
    said = pair[1].communicate(timeout=20)[1]  # an ordinary exit would take five minutes
    assert pair[1].returncode == 2
    assert said.strip().splitlines()[-1] == "no such folder"
    _ended_by(pair[0], 1)


def test_when_the_first_is_killed_the_other_ends():
    pair = _pair()
    pair[0].send_signal(signal.SIGKILL)
    _ended_by(pair[1], 0)
    pair[0].communicate()


def test_in_training_a_signal_to_one_ends_both_at_the_same_step():
    pair = _pair(_LISTENER, heartbeat=60)
    pair[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [75, 75], said
    calls = [out.split("reached ")[1] for out, _ in said]
    assert calls[0] == calls[1]
    assert "SIGINT: saving after this step" in said[1][1]


def test_outside_training_it_ends_at_once_also_where_nobody_reads_what_it_says():
    pair = _pair(_LISTENER, flags=(1, 1), heartbeat=60)
    pair[1].stderr.close()
    for process in pair:
        process.send_signal(signal.SIGTERM)
    said = pair[0].communicate(timeout=20)[1]  # with JAX's own handler in place: never
    assert pair[1].wait(20) == pair[0].returncode == 75
    assert said.strip().splitlines()[-1] == "SIGTERM: there is nothing to save"
    pair[1].stdout.close()


def test_an_indexed_job_needs_the_kubernetes_package(monkeypatch):
    job = {**POD, "JOB_COMPLETION_INDEX": "1"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match=r"pip install 'jax\[k8s\]'"):
        distributed.find(None, 1, 0, job)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    expected = ("Kubernetes", {"cluster_detection_method": "k8s"})
    assert distributed.find(None, 1, 0, job) == expected


def test_the_cache_of_compiled_programs_that_the_user_names_stays(monkeypatch, tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    distributed.keep_compiled_programs()
    assert before and jax.config.values["jax_compilation_cache_dir"] == before
