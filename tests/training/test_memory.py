"""Out of memory is one line with what to set, and what it names fits: limits are faked, one command is real."""

import dataclasses
import re
import subprocess
import sys
import time

import jax
import PIL.Image
import pytest

from grain_jax import config as config_lib
from grain_jax import inference, train
from grain_jax.convert import __main__ as convert_command
from grain_jax.convert import export
from grain_jax.core import errors
from grain_jax.evaluate import encode
from grain_jax.report import __main__ as report_command
from grain_jax.training import memory_check, memory_need, sharding, train_step
from tests import tiny
from tests.paths import ROOT

HUGE = 1 << 20
XLA = "RESOURCE_EXHAUSTED: Out of memory allocating 315363503480 bytes."
LIBTPU = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.29G of 15.75G hbm."


def _limit(total):
    """Of a machine with so many bytes, which the tests' 8 CPU devices share."""
    return memory_check.Limit(total // 8, 8, total)


def _set(config, line):
    """For each `--config.KEY=VALUE` that the line names, the config that has it."""
    found = {}
    for key, value in re.findall(r"--config\.([\w.]+)=(\w+)", line):
        value = int(value) if value.isdigit() else value
        if key == "mesh.fsdp":
            key, value = "mesh", dataclasses.replace(config.mesh, fsdp=value, data=-1)
        found[key] = dataclasses.replace(config, **{key: value})
    return found


def _compiled_bytes(config):
    """What the compiler says that a device needs for a step."""
    mesh = sharding.make_mesh(config.mesh)
    program = train_step.build(config, mesh, total_steps=10, steps_per_epoch=1.0)
    found = program.step.lower(program.state, program.batch).compile().memory_analysis()
    held = found.argument_size_in_bytes - found.alias_size_in_bytes
    return held + found.output_size_in_bytes + found.temp_size_in_bytes


def test_a_step_that_does_not_fit_is_refused_before_the_first_and_what_is_named_fits(
    tmp_path, monkeypatch
):
    config = tiny.small(batch_size=512, text__pack_group=1)
    needs = 8 * _compiled_bytes(config)
    there = _limit(round(0.6 * needs))
    monkeypatch.setattr(memory_check, "limit", lambda: there)
    monkeypatch.setattr(train.device, "Prefetch", lambda *_: pytest.fail("the input was started"))
    with pytest.raises(errors.OutOfMemory) as caught:
        train.train(config, tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(
        f"out of memory: the step needs about {memory_check.gigabytes(needs)}, this machine has"
        f" {memory_check.gigabytes(0.6 * needs)}; largest: activations, "
    )
    named = _set(config, line)
    assert "batch_size" in named and named["batch_size"].batch_size < 512
    smaller = config_lib.from_dict(dataclasses.asdict(named["batch_size"]))
    assert _compiled_bytes(smaller) <= there.bytes


def test_arithmetic_refuses_before_the_data_set_is_made(tmp_path, monkeypatch):
    opened = lambda *_: pytest.fail("the data set was opened")
    monkeypatch.setattr(train.sources, "open_source", opened)
    config = tiny.config(batch_size=HUGE)
    with pytest.raises(errors.OutOfMemory, match="largest: activations.*which grow with"):
        monkeypatch.setattr(memory_check, "limit", lambda: _limit(2**30))
        train.train(config, tmp_path)
    assert not list(tmp_path.iterdir())
    # An accelerator with room for it, on a host that cannot hold two batches of 800 MB.
    monkeypatch.setattr(memory_check, "limit", lambda: memory_check.Limit(2**40, None, 10**9))
    told = r"makes batches of 805.3 MB on this machine, which has 1.0 GB. Set --config.batch_size=262144,"
    with pytest.raises(errors.OutOfMemory, match=told):
        train.train(config, tmp_path)


@pytest.fixture(scope="module")
def large():
    """A config, its mesh and its need."""
    config = tiny.config(batch_size=4096, text__pack_group=8, text__pack_rows=24)
    mesh = sharding.make_mesh(config.mesh)
    return config, mesh, memory_need.estimate(config, mesh)


def test_all_that_is_named_can_be_set_and_fits_by_the_same_arithmetic(large):
    config, mesh, need = large
    room = 0.5 * need.total(512, 1)
    named = _set(config, memory_check.advice(config, mesh, need, room))
    assert set(named) == {"batch_size", "microbatches", "remat"}
    assert named["batch_size"].batch_size == 1024 and named["microbatches"].microbatches == 4
    for key, changed in named.items():
        changed = config_lib.from_dict(dataclasses.asdict(changed))
        sharding.check_batch(changed, mesh)
        needs = memory_need.estimate(changed, mesh).total(
            changed.batch_size // 8, changed.microbatches
        )
        assert needs <= room, key


def test_nothing_is_named_that_would_not_help(large):
    config, mesh, need = large
    # XLA's CPU backend undoes remat there.
    image = dataclasses.replace(config.model.image, unroll=2)
    unrolled = dataclasses.replace(config, model=dataclasses.replace(config.model, image=image))
    named = _set(config, memory_check.advice(unrolled, mesh, need, 0.5 * need.total(512, 1)))
    assert set(named) == {"batch_size", "microbatches"}
    assert "alone is enough" in memory_check.advice(unrolled, mesh, need, 1000)


def test_a_state_that_does_not_fit_is_to_be_cut(monkeypatch):
    config = tiny.config()
    mesh = sharding.make_mesh(config.mesh)
    program = train_step.build(config, mesh, total_steps=10, steps_per_epoch=1.0)
    state = sum(memory_need.state_bytes(program).values())
    there = memory_check.Limit(state - 1, None, 2**40)
    memory_check.check(config, mesh, there)
    with pytest.raises(errors.OutOfMemory, match="parameters, optimiser state") as caught:
        memory_check.check(config, mesh, there, program)
    named = _set(config, str(caught.value))
    assert set(named) == {"mesh"} and named["mesh"].mesh.fsdp > 1
    assert "a device has" in str(caught.value)


class _ResourceExhaustedError(Exception):
    """TensorFlow's."""


_ResourceExhaustedError.__name__ = "ResourceExhaustedError"


@pytest.mark.parametrize(
    "error,line",
    [
        (jax.errors.JaxRuntimeError(XLA), "(Out of memory allocating 315363503480 bytes); "),
        (jax.errors.JaxRuntimeError(LIBTPU), "(Ran out of memory in memory space hbm. Used"),
        (MemoryError(), "out of memory in it; "),
        (MemoryError("Unable to allocate 3.64 TiB"), "(Unable to allocate 3.64 TiB); "),
        (_ResourceExhaustedError("OOM when allocating tensor with shape[10]"), "(OOM when alloc"),
    ],
)
def test_every_allocator_has_its_line(error, line):
    with pytest.raises(errors.OutOfMemory) as caught:
        with errors.out_of_memory_in_a_line("it"):
            raise error
    assert line in str(caught.value) and str(caught.value).endswith(errors.MORE_MEMORY)


def test_a_quota_is_no_allocator():
    with pytest.raises(jax.errors.JaxRuntimeError):
        with errors.out_of_memory_in_a_line("it"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: quota of requests exceeded")


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


def _runs_out(*_, **__):
    raise jax.errors.JaxRuntimeError(XLA)


def test_an_evaluation_says_it(tmp_path):
    predictor = type("Predictor", (), {"encode_image_and_regions": _runs_out})()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(errors.OutOfMemory, match="out of memory in images .*--batch-size"):
        list(encode.encode_images(predictor, [tmp_path / "a.png"], label="images", unreadable={}))


@pytest.mark.parametrize(
    "main,arguments",
    [
        (export.main, ["--checkpoint=a", "--output=b"]),
        (convert_command.main, ["to-torch", "--input=a", "--output=b"]),
        (report_command.main, ["a"]),
    ],
)
def test_commands_that_load_a_model_say_it(main, arguments, monkeypatch, capsys):
    monkeypatch.setattr(inference, "load", _runs_out)
    monkeypatch.setattr(report_command.page, "write", _runs_out)
    monkeypatch.setitem(convert_command.COMMANDS, "to-torch", _runs_out)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("out of memory in ") and "Traceback" not in str(lines)


@pytest.mark.slow
def test_the_command_with_a_million_images(tmp_path):
    began = time.monotonic()
    command = [sys.executable, "-m", "grain_jax.train", "--config", "tests/run_config.py"]
    command += [f"--workdir={tmp_path}/w", "--config.batch_size=1000000000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert line.startswith("out of memory: the step needs about ")
    assert "this machine has" in line and "--config.batch_size=" in line
    assert time.monotonic() - began < 120 and not (tmp_path / "w").exists()


def test_what_the_allocator_refuses_names_half_at_most(tmp_path, monkeypatch):
    """Others may hold the memory: that the arithmetic would have let it pass says nothing."""
    of_the_process = (train, "keep_freed_memory"), (train.compiled, "use")
    of_the_process += (train.ending, "quiet_threads"), (train.ending.PreemptionHandler, "listen")
    for owner, name in of_the_process:
        monkeypatch.setattr(owner, name, lambda *_: None)
    monkeypatch.setattr(memory_check, "limit", lambda: _limit(2**40))
    monkeypatch.setattr(train, "train", _runs_out)
    flags = ["--config=tests/run_config.py", f"--workdir={tmp_path}", "--config.batch_size=4096"]
    with pytest.raises(errors.OutOfMemory) as caught:
        train.main(flags)
    line = str(caught.value)
    assert line.startswith(
        "out of memory in training (Out of memory allocating 315363503480 bytes); largest: activations"
    )
    assert "Set --config.batch_size=1024 (about" in line
