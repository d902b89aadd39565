"""Out of memory is one line with what to set."""

from unittest import mock

import jax
import pytest

from grain_jax.core import errors
from grain_jax.train import memory_check, run
from tests import tiny

pytestmark = pytest.mark.long

XLA = "RESOURCE_EXHAUSTED: Out of memory allocating 315363503480 bytes."
LIBTPU = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.29G of 15.75G hbm."
CONFIG = tiny.small(text__pack_group=1, text__pack_rows=6)  # the program of test_run.py
KEYS = ("--config.microbatches", "--config.remat=full", "--config.mesh.fsdp")


@pytest.fixture(scope="module")
def sizes():
    return memory_check.state_bytes(tiny.program(CONFIG))


@pytest.mark.parametrize("room, part", [(-1, "parameters, moments"), (0, "(state and batch")])
def test_a_run_that_does_not_fit_ends_before_the_first_step(sizes, tmp_path, monkeypatch, room, part):
    """By shapes alone, and by the figures of the compiler."""
    there = sum(sizes.values()) + room
    monkeypatch.setattr(memory_check, "device_bytes", lambda: there)
    monkeypatch.setattr(run.device, "Prefetch", lambda *_: pytest.fail("the input was started"))
    with pytest.raises(errors.OutOfMemory) as caught:
        run.train(CONFIG, tmp_path)
    line = str(caught.value)
    assert line.startswith("out of memory: the step needs ") and "\n" not in line
    assert part in line and f"a device has {memory_check.gigabytes(there)}" in line
    assert all(key in line for key in KEYS)


OfTensorFlow = type("ResourceExhaustedError", (Exception,), {})


@pytest.mark.parametrize(
    "error,line",
    [
        (jax.errors.JaxRuntimeError(XLA), "(Out of memory allocating 315363503480 bytes); "),
        (jax.errors.JaxRuntimeError(LIBTPU), "(Ran out of memory in memory space hbm. Used"),
        (MemoryError("Unable to allocate 3.64 TiB"), "(Unable to allocate 3.64 TiB); "),
        (OfTensorFlow("OOM when allocating tensor with shape[10]"), "(OOM when alloc"),
    ],
)
def test_every_allocator_has_its_line(error, line):
    with pytest.raises(errors.OutOfMemory) as caught:
        with errors.out_of_memory_in_a_line("it"):
            raise error
    assert line in str(caught.value) and str(caught.value).endswith(errors.MORE_MEMORY)


def test_the_container_counts(tmp_path):
    machine = memory_check.host_bytes(tmp_path)  # no control groups there
    groups = tmp_path / "sys/fs/cgroup"
    (groups / "a/b").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (groups / "a/b/memory.max").write_text("max\n")
    assert memory_check.host_bytes(tmp_path) == machine
    (groups / "a/memory.max").write_text("1000000\n")
    assert memory_check.host_bytes(tmp_path) == 1000000
    (groups / "memory").mkdir()
    (groups / "memory/memory.limit_in_bytes").write_text("2000\n")  # version 1
    assert memory_check.host_bytes(tmp_path) == 2000


def test_what_the_allocator_refuses_in_training_names_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(run.distributed, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(run.ending.PreemptionHandler, "listen", lambda self: None)
    refuse = mock.Mock(side_effect=jax.errors.JaxRuntimeError(XLA))
    monkeypatch.setattr(run, "train", refuse)
    with pytest.raises(errors.OutOfMemory) as caught:
        run.main(["--config=tests/run_config.py", f"--workdir={tmp_path}"])
    line = str(caught.value)
    assert line.startswith("out of memory in training (Out of memory allocating 315363503480 byt")
    assert all(key in line for key in KEYS)
