"""The chips that a run can be planned for, and the names of their slices and nodes.

Peak rates are the makers', so times by them are lower bounds. Sources: https://cloud.google.com/tpu/docs,
https://jax-ml.github.io/scaling-book/tpus, NVIDIA's data sheets, gb200.txtpb of
https://github.com/openxla/xla, https://cloud.google.com/compute/docs/gpus/gpu-network-bandwidth. A TPU's
memory is what libtpu 0.0.42.1 allows a program. Its clock is peak / (2 FLOPs x MXUs x their area x rows a
cycle), with the cores and MXUs of JAX's Pallas. A row a cycle gives v5e the 1.5 GHz of the scaling book. For
v6e libtpu puts products of 16 rows 8 cycles apart: two rows. tpu7x is taken to have two: no source was found.

A *device* is what JAX sees: a chip, but on tpu7x half of a chip. All numbers are per device.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from grain_jax.core import errors
from grain_jax.train.flops import peak_flops

_JAX_TAKES = 0.75  # of a GPU's memory, https://docs.jax.dev/en/latest/gpu_memory_allocation.html


class Gpu(NamedTuple):
    """What XLA must know of a GPU that is not there; memory as `nvidia-smi` has it, less than printed.

    `machine` and `node` are what a plan must know.
    """

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock_ghz: float
    shared_memory: int  # bytes, of a multiprocessor
    l2_cache: int  # MiB
    memory: int  # MiB
    memory_rate: float  # bytes per second
    machine: int = 8  # GPUs of a machine
    node: int = 8  # most GPUs that NVLink joins: all of a machine, or of a rack

    def description(self, name: str) -> str:
        """The text of its GpuTargetConfigProto, `target_config` of JAX's `get_topology_desc`."""
        major, minor = self.capability
        # From 9.0 on, instructions of this generation alone (wgmma, tcgen05) are compiled for, as JAX does.
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""\
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: {48 * 1024} shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block_optin: {self.shared_memory - 1024}
  core_count: {self.cores} fpus_per_core: {64 if major < 9 else 128} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory * 2**20} memory_bandwidth: {self.memory_rate:.0f}
  l2_cache_size: {self.l2_cache * 2**20} device_address_bits: 64 ecc_enabled: true
  driver_version: "12.9.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a chip and its share of its machine; bandwidths are bytes per second, one way."""

    name: str  # as in a topology, "v5e"
    device_kind: str  # as `jax.Device.device_kind` has it
    memory: float  # GiB; of a TPU what a program may use, of a GPU what is printed
    hbm_bytes_per_second: float  # of its own memory
    link_bytes_per_second: float  # to one neighbour: one link of the torus; on a GPU all of NVLink
    dcn_bytes_per_second: float  # share of the machine's network between slices, or between GPU nodes
    axes: int = 0  # of its torus: 2 or 3; of GPUs 0
    # Its name in TPU_ACCELERATOR_TYPE, and what that counts of a chip (2 TensorCores, or itself).
    libtpu: tuple[str, int] = ("", 0)
    devices: int = 1  # of a chip. A ring runs through both, so that a link of the chip carries one hop of it.
    clock_ghz: float = 0.0  # of a TPU
    gpu: Gpu | None = None  # what XLA must know of a GPU; None of TPUs

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, for which libtpu compiles; for GPUs the CUDA plugin of JAX does."""
        return self.gpu is None

    @property
    def hbm_bytes(self) -> float:
        """Memory that a program may use."""
        return (1 if self.is_tpu else _JAX_TAKES) * self.memory * 2**30

    @property
    def bf16_flops(self) -> float:
        """Peak of matrix products in bfloat16, dense, FLOP a second."""
        return peak_flops(self.device_kind, "bfloat16")

    @property
    def ici_bytes_per_second(self) -> float:
        """What it sends in a ring. TPU: two links, since a ring over an axis of the torus runs both ways.

        An axis that does not close on itself gives about half.
        """
        return (2 if self.is_tpu else 1) * self.link_bytes_per_second


_A100_40 = Gpu((8, 0), 108, 1.41, 164 * 1024, 40, 40_370, 1555e9)
_A100_80 = _A100_40._replace(memory=81_157, memory_rate=2039e9)
_H100 = Gpu((9, 0), 132, 1.98, 228 * 1024, 50, 81_008, 3352e9)
_H200 = _H100._replace(memory=144_384, memory_rate=4800e9)
_B200 = Gpu((10, 0), 148, 1.965, 228 * 1024, 126, 182_642, 8000e9)
_GB200 = Gpu((10, 0), 152, 2.062, 228 * 1024, 129, 188_730, 8000e9, machine=4, node=72)
_ALL = (
    Chip("v4", "TPU v4", 30.75, 1200e9, 50e9, 6.25e9, 3, ("v4", 2), clock_ghz=1.05),
    Chip("v5e", "TPU v5 lite", 15.75, 819e9, 50e9, 3.125e9, 2, ("v5litepod", 1), clock_ghz=1.5),
    Chip("v5p", "TPU v5", 95.74, 2765e9, 100e9, 6.25e9, 3, ("v5p", 2), clock_ghz=1.75),
    Chip("v6e", "TPU v6 lite", 31.25, 1638e9, 100e9, 12.5e9, 2, ("v6e", 1), clock_ghz=1.75),
    Chip("tpu7x", "TPU7x", 94.75, 3690e9, 100e9, 6.25e9, 3, ("tpu7x", 2), devices=2, clock_ghz=2.2),
    Chip("a100-40", "NVIDIA A100-SXM4-40GB", 40, 1555e9, 300e9, 1.5625e9, gpu=_A100_40),
    Chip("a100-80", "NVIDIA A100-SXM4-80GB", 80, 2039e9, 300e9, 1.5625e9, gpu=_A100_80),
    Chip("h100", "NVIDIA H100 80GB HBM3", 80, 3350e9, 450e9, 25e9, gpu=_H100),
    Chip("h200", "NVIDIA H200", 141, 4800e9, 450e9, 50e9, gpu=_H200),
    Chip("b200", "NVIDIA B200", 180, 8000e9, 900e9, 50e9, gpu=_B200),
    Chip("gb200", "NVIDIA GB200", 186, 8000e9, 900e9, 50e9, gpu=_GB200),
)
CHIPS = {chip.name: chip for chip in _ALL}


class Topology(NamedTuple):
    """Chips that work together: `count` devices in `slices` slices (TPU) or nodes (GPU) of `shape` chips."""

    chip: Chip
    count: int
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips in all."""
        return self.count // self.chip.devices

    @property
    def hosts(self) -> int:
        """Machines that hold the chips."""
        a_slice = self.chips // self.slices
        machine = self.chip.gpu.machine if self.chip.gpu else 4  # of TPUs: one VM of a slice
        return self.slices * math.ceil(a_slice / machine)


def parse_topology(text: str) -> Topology:
    """Reads "v5e:16x16", "v5e-256", "v5e:16x16*2" (two slices) or "h100:8x2" (8 GPUs per node, 2 nodes).

    Args:
      text: chip, colon, shape. "*n": n TPU slices that the data-centre network joins. GPUs: those per node,
        which NVLink joins (at most 8; gb200: 72), and nodes (default 1); `shape` is (GPUs per node,). TPU
        slices may have Google's name, chip, hyphen, size. On v4, v5p and tpu7x the size counts TensorCores,
        and a chip has two.

    Raises:
      UserError: an unknown chip, or a shape that such chips do not come in.
    """
    name = text.strip().lower()
    named = re.fullmatch(r"(\w+)-(\d+)(\*\d+)?", name)
    if named and named[1] in CHIPS and CHIPS[named[1]].is_tpu:
        name = f"{named[1]}:{_shape_of(CHIPS[named[1]], int(named[2]))}{named[3] or ''}"
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not match or match[1] not in CHIPS:
        raise errors.UserError(
            f"topology: got {text!r}, expected CHIP:SHAPE such as v5e:16x16, v5e:16x16*2 (two slices),"
            f" v4:4x4x8 or h100:8x2 (GPUs per node x nodes); CHIP is one of {', '.join(CHIPS)}"
        )
    chip = CHIPS[match[1]]
    shape = tuple(int(n) for n in match[2].split("x"))
    slices = int(match[3] or 1)
    good = min(*shape, slices) > 0
    if chip.gpu is None:
        good &= len(shape) == chip.axes
        side = "x".join("448"[: chip.axes])
        expected = f"{chip.axes} numbers, such as {chip.name}:{side}, or a size such as {chip.name}-64"
    else:
        node = chip.gpu.node
        good &= match[3] is None and len(shape) <= 2 and shape[0] <= node
        expected = f"at most {node} GPUs per node x nodes, such as {chip.name}:{node}x2"
        shape, slices = shape[:1], math.prod(shape[1:])
    if not good:
        raise errors.UserError(f"topology: got {text!r}, expected {expected}")
    return Topology(chip, math.prod(shape) * slices * chip.devices, shape, slices)


def _shape_of(chip: Chip, size: int) -> str:
    """The shape of the slice that Google calls CHIP-SIZE: "8x8" of v5e-64; "0" if there is none."""
    count = size // chip.libtpu[1]
    if count < 1 or count & (count - 1) or count * chip.libtpu[1] != size:
        return "0"
    doublings = count.bit_length() - 1
    sides = [2 ** ((doublings + axis) // chip.axes) for axis in range(chip.axes)]
    return "x".join(str(side) for side in sorted(sides, key=lambda side: (side == 1, side)))
