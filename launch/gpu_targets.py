"""What XLA must know of a GPU that is not there: the text of its GpuTargetConfigProto.

Figures: NVIDIA's data sheets and architecture white papers of A100, H100, H200 and B200 (multiprocessors, clock,
L2 cache, memory and its bandwidth), the tables of compute capabilities in the CUDA C++ programming guide (limits
of a block and of a multiprocessor). Memory is a little less than is printed: what is left beside ECC, as
`nvidia-smi` shows it.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """One model of GPU; memory in bytes."""

    name: str  # as `jax.Device.device_kind`
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock_ghz: float
    shared_memory: int  # of a multiprocessor
    l2_cache: int
    memory: int
    memory_rate: float  # bytes a second


_MIB = 2**20
_KIB = 2**10
GPUS = {
    "a100-40": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 164 * _KIB, 40 * _MIB, 40_370 * _MIB, 1555e9
    ),
    "a100-80": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 164 * _KIB, 40 * _MIB, 81_157 * _MIB, 2039e9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 228 * _KIB, 50 * _MIB, 81_008 * _MIB, 3352e9
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 228 * _KIB, 50 * _MIB, 144_384 * _MIB, 4800e9),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 1.965, 228 * _KIB, 126 * _MIB, 182_642 * _MIB, 8000e9),
}


def description(gpu: Gpu) -> str:
    """The text for `get_topology_desc(platform="cuda", target_config=...)`."""
    major, minor = gpu.capability
    # From 9.0 on, instructions of this generation alone (wgmma, tcgen05) are compiled for, as JAX does.
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - _KIB}
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {gpu.cores}
  fpus_per_core: {64 if major < 9 else 128}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {gpu.memory_rate:.0f}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {extension}
  }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  name: "{gpu.name}"
  device_address_bits: 64
  ecc_enabled: true
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 10
}}
device_description_str: "{gpu.name}"
"""
