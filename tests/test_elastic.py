"""Who serves which lanes on any layout, and runs that go on with other devices, meshes and processes."""

import dataclasses
import functools
import shutil
import subprocess

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from grain_jax import train
from grain_jax.input_pipeline import synthetic
from grain_jax.training import sharding
from tests import runs, tiny
from tests.paths import ROOT


@dataclasses.dataclass(frozen=True)
class Device:
    """What the layout of a pod needs of a device."""

    id: int
    process_index: int


def _layout(processes, shape):
    """The sharding of a batch on devices that belong to these processes, in the order of the mesh."""
    devices = np.empty(len(processes), object)
    for i, process in enumerate(processes):
        devices[i] = Device(i, process)
    return sharding.batch_sharding(Mesh(devices.reshape(shape), ("data", "fsdp", "tensor")))


@pytest.mark.parametrize(
    "processes,shape,expected",
    [
        ([0, 0, 1, 1], (4, 1, 1), {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}),
        ([0, 1, 0, 1], (4, 1, 1), {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}),  # a torus goes to and fro
        ([1, 1, 0, 0], (2, 2, 1), {0: (4, 5, 6, 7), 1: (0, 1, 2, 3)}),
        ([0, 1, 0, 1], (2, 1, 2), {0: tuple(range(8)), 1: tuple(range(8))}),  # tensor across hosts
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 4), {1: (0, 1, 2, 3), 2: (4, 5, 6, 7)}),
        ([0, 1, 0, 1, 2, 3, 2, 3], (4, 1, 2), {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 3: (4, 5, 6, 7)}),
    ],
)
def test_a_process_serves_the_lanes_on_its_devices(processes, shape, expected):
    of = _layout(processes, shape)
    config = tiny.config(input__lanes=8)
    whole = next(synthetic.batches(config, start_step=3))
    rows = of.devices_indices_map((16,))
    for process, lanes in expected.items():
        got = sharding.lanes_of_process(of, batch_size=16, lanes=8, process_index=process)
        assert got == lanes
        # What it serves are its devices' rows, in the order in which they stand in the batch.
        held = sorted(
            {i for d, (r,) in rows.items() if d.process_index == process for i in range(16)[r]}
        )
        part = next(synthetic.batches(config, lanes=got, start_step=3))
        for name in ("image", "caption_id", "region_boxes_cxcywh"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[held])


def test_a_lane_on_two_processes_is_one_line():
    with pytest.raises(
        sharding.ShardingError,
        match="input.lanes: got 2, but process 0 holds 4 of the 8 images of lane 0; expected a"
        " multiple of 4",
    ):
        sharding.lanes_of_process(
            _layout([0, 1, 0, 1], (4, 1, 1)), batch_size=16, lanes=2, process_index=1
        )


# One image a packing group, so that 16 devices have one each.
CHANGES = {"text.pack_group": 1, "text.pack_rows": 6, "checkpoint_every": 5, **runs.SMALL}


def _config(**overrides):
    return tiny.config(**{k.replace(".", "__"): v for k, v in CHANGES.items()}, **overrides)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 10 steps on 8 devices, (8, 1, 1), with checkpoints at 5 and 10."""
    workdir = tmp_path_factory.mktemp("saved")
    train.train(_config(), workdir)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """The same, as it was at step 5."""
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/10")
    return tmp_path / "run"


def _assert_goes_on(saved, workdir):
    before, after = runs.lines(saved), runs.lines(workdir)
    assert [line["step"] for line in after] == list(range(1, 11))
    for a, b in zip(before[5:], after[5:], strict=True):
        assert b["batch_chain"] == a["batch_chain"] and b["pixel_chain"] == a["pixel_chain"]
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-3)


@pytest.mark.parametrize(
    "mesh", [*(pytest.param((n, 1, 1), marks=pytest.mark.slow) for n in (1, 4)), (2, 2, 2)]
)
def test_another_mesh_goes_on_with_the_same_batches_and_losses(saved, workdir, mesh, monkeypatch):
    data, fsdp, tensor = mesh
    devices = jax.devices()[: data * fsdp * tensor]
    monkeypatch.setattr(
        sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=devices)
    )
    train.train(_config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor), workdir)
    _assert_goes_on(saved, workdir)


@pytest.mark.parametrize("processes,devices", [(2, 4), pytest.param(1, 16, marks=pytest.mark.slow)])
def test_other_processes_go_on_with_the_same_batches_and_losses(saved, workdir, processes, devices):
    command = runs.command(workdir, CHANGES, processes=processes, devices=devices)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _assert_goes_on(saved, workdir)
