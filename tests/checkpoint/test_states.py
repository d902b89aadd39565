"""Checkpoints on disk: which are kept, damaged ones, a full disk, what a mismatch says; digests."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grain_jax.checkpoint import digests, states
from grain_jax.checkpoint import files as checkpoint_files
from grain_jax.core import errors
from tests import tiny
from tests.paths import ROOT

DATA = [{"name": "birds", "split": "train", "shard_lengths": [4, 4, 3], "digest": "0f" * 16}]


class State(NamedTuple):
    """What `save` needs of a TrainState."""

    step: jax.Array
    params: Any
    opt_state: Any = ()
    ema_params: Any = ()


def state(step, width=8):
    weights = jax.random.normal(jax.random.key(step), (64, width))  # random: it must not compress away
    return State(jnp.int32(step), {"tower": {"weights": weights, "bias": jnp.zeros(width)}})


def abstract(like):
    place = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)


def save_steps(workdir, steps, config, metrics=None, width=8):
    checkpoints = states.Checkpoints(workdir, config)
    for step in steps:
        saved = state(step, width)
        checkpoints.save(saved, metrics and metrics(step), DATA)
    checkpoints.wait()
    checkpoints.close()


def restore(workdir, config, like=None):
    """(the restored state or None, what was said)."""
    said = []
    checkpoints = states.Checkpoints(workdir, config)
    restored = checkpoints.restore_newest(abstract(like or state(0)), said.append, DATA)
    checkpoints.close()
    return restored, said


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_the_last_every_k_and_the_best_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 6: 2.5}  # 5, 7 and 8 have none
    config = tiny.config(
        checkpoint_keep=2, checkpoint_keep_every=3, checkpoint_best_metric="loss", checkpoint_best_mode="min"
    )
    measured = lambda step: {"loss": losses[step]} if step in losses else None
    save_steps(tmp_path, range(1, 6), config, measured)
    save_steps(tmp_path, range(6, 9), config, measured)  # a restart knows them all
    assert kept(tmp_path) == [2, 3, 6, 7, 8]
    assert checkpoint_files.read_items(tmp_path / "checkpoints/6").best == 2.5
    (tmp_path / "last").mkdir()
    save_steps(tmp_path / "last", range(1, 6), tiny.config(checkpoint_keep=2))
    assert kept(tmp_path / "last") == [4, 5]


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    finished = []
    with states.Checkpoints(tmp_path, tiny.config()) as checkpoints:
        start = checkpoints._checkpointer.save_async

        def save_async(*args, **kwargs):
            finished.append(checkpoint_files.finished_steps(tmp_path))
            return start(*args, **kwargs)

        monkeypatch.setattr(checkpoints._checkpointer, "save_async", save_async)
        for step in (1, 2):
            checkpoints.save(state(step, width=1 << 17))  # 32 MiB
    assert finished == [[], [1]]


def test_devices_share_the_writing_of_large_arrays(tmp_path):
    """Of 8 MiB, each of 8 devices with a copy writes 1 MiB; of a byte less, one writes all."""
    devices = jax.device_count()
    place = NamedSharding(jax.make_mesh((devices,), ("all",)), PartitionSpec())
    size = devices << 18  # float32
    params = {"large": jnp.ones(size), "small": jnp.ones(size - devices)}
    with states.Checkpoints(tmp_path, tiny.config()) as checkpoints:
        checkpoints.save(State(jnp.int32(1), jax.device_put(params, place)))
    stored = {}
    for path in tmp_path.rglob("array_metadatas/*"):
        for array in json.loads(path.read_text())["array_metadatas"]:
            metadata = array["array_metadata"]
            stored[metadata["param_name"]] = metadata["write_shape"]
    assert stored["params.large"] == [size // devices] and stored["params.small"] == [size - devices]


def test_a_save_leaves_no_file_open(tmp_path):
    """Three stayed open for each save: a run of a week has thousands."""
    checkpoints, counts = states.Checkpoints(tmp_path, tiny.config()), []
    for step in range(6):
        checkpoints.save(state(step))
        checkpoints.wait()
        counts.append(len(os.listdir("/dev/fd")))
    checkpoints.close()
    assert counts[-1] <= counts[0]


def _largest(folder):
    """The file with the arrays."""
    files = [p for p in (folder / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "bit flipped": lambda f: _flip_a_bit(_largest(f)),
    "truncated": lambda f: _largest(f).write_bytes(_largest(f).read_bytes()[:100]),
    "data gone": lambda f: _largest(f).unlink(),
    "metadata cut": lambda f: (f / "state/_METADATA").write_text('{"tree_metadata": {'),
    "config gone": lambda f: (f / "_CHECKPOINT_METADATA").unlink(),
    "config cut": lambda f: (f / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"co'),
    "empty": lambda f: [p.unlink() if p.is_file() else shutil.rmtree(p) for p in f.iterdir()],
}


MEASURED = tiny.config(checkpoint_keep=2, checkpoint_best_metric="loss")
LOSS = lambda step: {"loss": float(step), "other": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints 4 and 8."""
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir, (4, 8), MEASURED, LOSS)
    return workdir


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(saved, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    DAMAGE[damage](workdir / "checkpoints" / "8")
    restored, said = restore(workdir, MEASURED)
    assert len(said) == 1 and said[0].startswith("checkpoint 8 is damaged"), said
    assert ("not what was saved: state" in said[0]) == (damage == "bit flipped"), said
    assert kept(workdir) == [4] and (workdir / "damaged_checkpoints/8").is_dir()
    assert int(restored.step) == 4
    np.testing.assert_array_equal(restored.params["tower"]["weights"], state(4).params["tower"]["weights"])
    if damage == "truncated":  # written again
        save_steps(workdir, (8,), MEASURED, LOSS)
        restored, said = restore(workdir, MEASURED)
        assert int(restored.step) == 8 and not said


@pytest.mark.parametrize("item, count", [("config", 8), ("data", 15), ("best", 4)])
def test_a_flipped_bit_beside_the_state_is_damage_too(saved, tmp_path, item, count):
    """It must not become a key that the user never wrote, other data, or a KeyError."""
    for i in range(count):
        workdir = tmp_path / str(i)
        shutil.copytree(saved, workdir)
        path = workdir / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
        content = bytearray(path.read_bytes())
        part = json.dumps(json.loads(content)["custom_metadata"][item]).encode()
        bit = 8 * content.index(f'"{item}": '.encode() + part) + 8 * len(item) + 32
        bit += i * 8 * len(part) // count + i % 8
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert states.newest_config(workdir) == (MEASURED, "checkpoint 4"), bit
        restored, said = restore(workdir, MEASURED)
        assert int(restored.step) == 4 and len(said) == 1, bit
        assert said[0].startswith("checkpoint 8 is damaged"), said


def test_all_damaged_is_one_line_and_moves_nothing(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for step in ("4", "8"):
        DAMAGE["truncated"](workdir / "checkpoints" / step)
    with pytest.raises(checkpoint_files.CheckpointError, match="none of the checkpoints 8, 4 can") as e:
        restore(workdir, MEASURED)
    assert len(str(e.value).splitlines()) == 1
    assert kept(workdir) == [4, 8]


_RESTORES = """
import sys
from grain_jax.runtime import distributed
from tests.checkpoint import test_states
address, count, me = (word.split("=")[1] for word in sys.argv[2:])
distributed.initialize(address, int(count), int(me), 60)
restored, said = test_states.restore(f"{sys.argv[1]}/{me}", test_states.MEASURED)
print(f"restored {restored.step}", *said, sep=" | ")
"""


def test_processes_that_see_other_damage_take_the_same_checkpoint(tmp_path):
    copies = tmp_path / "0", tmp_path / "1"  # of each process
    save_steps(copies[0], (4, 8, 12, 16), dataclasses.replace(MEASURED, checkpoint_keep=4))
    shutil.copytree(*copies)
    DAMAGE["truncated"](copies[1] / "checkpoints/16")
    shutil.rmtree(copies[1] / "checkpoints/12")
    DAMAGE["truncated"](copies[0] / "checkpoints/8")
    two = [sys.executable, "-m", "grain_jax.launch.local", "--processes=2"]
    two += ["--devices-per-process=1", "--", sys.executable, "-c", _RESTORES, str(tmp_path)]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stderr.splitlines() if " restored " in line)
    for me, line in enumerate(said):
        start, *damaged = line.split(" | ")
        assert start == f"[{me}] restored 4" and len(damaged) == 3, said
        assert [f"(process {1 - me}: " in words for words in damaged] == [me == 0, me == 0, me == 1]


def test_what_a_cut_off_save_left_is_neither_read_nor_kept(tmp_path):
    save_steps(tmp_path, (4,), tiny.config())
    for step in (6, 8):  # 8 is saved again; nothing but the start removes 6
        (tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    restored, said = restore(tmp_path, tiny.config())
    assert int(restored.step) == 4 and not said
    save_steps(tmp_path, (8,), tiny.config())
    assert kept(tmp_path) == [4, 8]


def test_a_mismatch_names_each_array(saved):
    other = State(
        jnp.int32(0),
        {
            "tower": {"weights": jnp.zeros((64, 8), jnp.bfloat16), "bias": jnp.zeros(8)},
            "head": {"weights": jnp.zeros(2), "bias": jnp.zeros(2)},
        },
    )
    with pytest.raises(checkpoint_files.CheckpointError) as e:
        restore(saved, MEASURED, other)
    assert str(e.value).splitlines()[1:] == [
        "  params/head/bias: stored nothing, expected (2,) float32",
        "  params/head/weights: stored nothing, expected (2,) float32",
        "  params/tower/weights: stored (64, 8) float32, expected (64, 8) bfloat16",
    ]
    with pytest.raises(checkpoint_files.CheckpointError, match="seed: the run has 0, got 1"):
        restore(saved, tiny.config(seed=1))


def test_what_a_step_computes_otherwise_is_said(saved):
    changes = dict(model__image__keep=0.5)
    given = dict(checkpoint_every=77, microbatches=2)  # of the same run
    restored, said = restore(saved, dataclasses.replace(MEASURED, **given))
    assert int(restored.step) == 8 and said == []
    _, said = restore(saved, tiny.config(**changes))
    assert said == ["goes on with other values than checkpoint 8: model.image.keep 1.0 -> 0.5"]
    longer = dataclasses.replace(MEASURED, total_steps=99, total_epochs=None)
    (line,) = restore(saved, longer)[1]
    assert f"total_steps {MEASURED.total_steps} -> 99" in line


def test_a_full_disk_for_real(tmp_path):
    config = tiny.config(checkpoint_keep=99)
    tmpfs = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(tmpfs, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(errors.StorageFault, match="No space left"):
            with errors.storage_faults_as_one_line(tmp_path):
                save_steps(tmp_path, range(1, 99), config, width=256)
        last = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        restored, said = restore(tmp_path, config, state(0, width=256))
        assert int(restored.step) == last and not said
        save_steps(tmp_path, (last + 1,), config, width=256)
        assert kept(tmp_path) == list(range(1, last + 2))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def _placed(mesh, params):
    spec = {"a": PartitionSpec("fsdp", None, "tensor"), "b": PartitionSpec(("data", "fsdp"))}
    put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    placed = {k: put(v, spec[k]) for k, v in params.items()}
    return State(jnp.int32(0), placed, {"m": placed["a"]}, {})


def _mixed(x):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_a_states_digest_is_that_of_plain_integers_on_any_mesh():
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(4, 3, 2)).astype(np.float32),
        "b": rng.normal(size=8).astype(jax.numpy.bfloat16),
    }
    totals = [0, 0]
    for name, x in params.items():
        seed = zlib.crc32(f"['{name}']".encode())
        for i, word in enumerate(x.view(f"u{x.dtype.itemsize}").reshape(-1).tolist()):
            first = _mixed((seed + i) % 2**32)
            totals[0] += word * (first | 1)
            totals[1] += word * (_mixed((first + 1) % 2**32) | 1)
    expected = "".join(f"{total % 2**32:08x}" for total in totals)
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 1)):
        mesh = tiny.mesh(*sizes)
        found = digests.of_state(_placed(mesh, params))
        assert found["params"] == expected, sizes
        assert sorted(found) == ["opt_state", "params", "step"]
    assert digests.of_arrays(params) == found["params"]
    changed = {k: v.copy() for k, v in params.items()}
    changed["a"][[0, 1]] = changed["a"][[1, 0]]  # rows exchanged
    other = digests.of_state(_placed(mesh, changed))
    assert other["params"] != found["params"] and other["opt_state"] != found["opt_state"]
    for bit in (0, 15, 31):
        changed = {k: v.copy() for k, v in params.items()}
        changed["a"].view(np.uint32)[3, 1, 0] ^= np.uint32(1 << bit)
        assert digests.of_state(_placed(mesh, changed))["params"] != found["params"], bit
