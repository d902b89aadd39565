"""XLA's flags for the tests' programs, whose time is mostly compiling."""

from importlib import metadata

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_VERSION = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
if _VERSION < (0, 11):
    # Kernels made by MLIR take twice as long to compile. Later releases have no others and refuse the flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    # A program is one module for LLVM: in 32 parts it takes 1.7 times the CPU.
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# Where other processes have the cores, devices start independent collectives in different orders and wait for
# each other for ever.
if _VERSION == (0, 10):
    FLAGS += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
