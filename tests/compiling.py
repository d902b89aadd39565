"""XLA's flags for the tests' programs: small, and run a few times, so that most of their time is compiling."""

from importlib import metadata

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Its kernels made by MLIR take twice as long to compile. Later releases have no other, and refuse the flag.
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
