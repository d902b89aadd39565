"""The mesh, the places of parameters and batches, and who serves which lanes on any layout."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from grain_jax import config as config_lib
from grain_jax.configs.grain_vitb16_cc12m import get_config as b16
from grain_jax.input_pipeline import derived, synthetic
from grain_jax.train import optim, sharding, train_step
from tests import tiny

pytestmark = pytest.mark.quick


def _abstract(c):
    tx = optim.optimizer(c.optim, lambda step: 0.0)
    return jax.eval_shape(lambda: train_step.init_state(c, tx))


def _mesh(data, fsdp, tensor):
    c = tiny.config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    return sharding.make_mesh(c.mesh)


def test_mesh_takes_the_rest_and_refuses_what_does_not_fit():
    assert dict(_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(sharding.ShardingError, match="= 3, expected 8 devices"):
        _mesh(3, 1, 1)


def test_moments_follow_their_parameters():
    c = tiny.config()
    _, placed = sharding.place_state(_abstract(c), c.sharding, _mesh(2, 2, 2))
    spec = placed.params["image"]["blocks"]["mlp"]["in"]["kernel"].spec
    assert tuple(spec) == (None, "fsdp", "tensor")
    assert placed.opt_state[1].mu["image"]["blocks"]["mlp"]["in"]["kernel"].spec == spec
    assert tuple(placed.params["text"]["token_embed"]["embedding"].spec) == ("tensor", "fsdp")
    assert tuple(placed.step.spec) == ()


@pytest.mark.parametrize(
    "mesh,to,overrides,message",
    [
        ((8, 1, 1), "no rule", {}, r"mlp/in/kernel: `sharding` has no rule for its axis 'mlp'"),
        ((4, 2, 1), "model", {}, r"'mlp' to 'model', expected one of data, fsdp, tensor"),
        ((4, 2, 1), "fsdp", {}, r"mlp/in/kernel: `sharding` sends two of its axes to 'fsdp'"),
        (
            (2, 2, 2),
            "tensor",
            dict(model__decoder__heads=1),
            r"axis 'heads' of 1 does not divide by mesh.tensor = 2",
        ),
    ],
)
def test_a_parameter_that_cannot_be_placed_is_named(mesh, to, overrides, message):
    """With that rule for the axis `mlp`."""
    c = tiny.config(**overrides)
    rules = tuple((a, to if a == "mlp" else m) for a, m in c.sharding if (a, to) != ("mlp", "no rule"))
    with pytest.raises(sharding.ShardingError, match=message):
        sharding.place_state(_abstract(c), rules, _mesh(*mesh))


def test_fsdp_keeps_an_eighth_of_the_state():
    c, _ = derived.planned(config_lib.from_dict(b16()), derived.Limits(8))
    program = tiny.program(dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, data=1, fsdp=8)))
    lines = sharding.table(program.state, program.shardings).splitlines()
    here, whole = 0, 0
    leaves = zip(jax.tree.leaves(program.state), jax.tree.leaves(program.shardings))
    for leaf, placed in leaves:
        here += np.prod(placed.shard_shape(leaf.shape)) * 4
        whole += np.prod(leaf.shape) * 4
    assert here / whole <= 0.15
    assert lines[-1].startswith(f"{here / 1e6:,.1f} MB per device, {here / whole:.3f} of")
    row = next(line for line in lines if "params/image/blocks/mlp/in/kernel" in line)
    assert row.split() == [
        "params/image/blocks/mlp/in/kernel", "12x768x3072", "float32", "(None,", "fsdp,", "tensor)",
        f"{12 * 768 * 3072 * 4 // 8:,}",
    ]  # fmt: skip


class _Chip:
    def __init__(self, index, slice_index):
        self.id, self.slice_index, self.process_index = index, slice_index, index // 4
        self.platform, self.device_kind = "cpu", "cpu"


def test_slices_are_cut_over_data_first():
    chips = [_Chip(i, i % 2) for i in range(16)]  # slices interleaved
    c = tiny.config(mesh__data=4, mesh__fsdp=2, mesh__tensor=2, mesh__dcn_data=2)
    slices = np.vectorize(lambda d: d.slice_index)(sharding.make_mesh(c.mesh, chips).devices)
    np.testing.assert_array_equal(slices, np.broadcast_to([[[0]], [[0]], [[1]], [[1]]], (4, 2, 2)))
    for slices, message in ((1, "got 1, expected a multiple of the 2"), (8, "divisor of mesh.data = 4")):
        with pytest.raises(sharding.ShardingError, match=f"dcn_data: .*{message}"):
            sharding.make_mesh(dataclasses.replace(c.mesh, dcn_data=slices), chips)


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
    layout = _layout(processes, shape)
    config = tiny.config(input__lanes=8)
    whole = next(synthetic.batches(config, start_step=3))
    rows = layout.devices_indices_map((16,))
    for process, lanes in expected.items():
        got = sharding.lanes_of_process(layout, batch_size=16, lanes=8, process_index=process)
        assert got == lanes
        # What it serves are its devices' rows, in the order in which they stand in the batch.
        rows_held = sorted(
            {i for d, (r,) in rows.items() if d.process_index == process for i in range(16)[r]}
        )
        part = next(synthetic.batches(config, lanes=got, start_step=3))
        for name in ("image", "caption_id", "region_boxes_cxcywh"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows_held])


def test_a_lane_on_two_processes_is_one_line():
    with pytest.raises(
        sharding.ShardingError,
        match="input.lanes: got 2, but process 0 holds 4 of the 8 images of lane 0; expected a multiple of 4",
    ):
        sharding.lanes_of_process(_layout([0, 1, 0, 1], (4, 1, 1)), batch_size=16, lanes=2, process_index=1)
