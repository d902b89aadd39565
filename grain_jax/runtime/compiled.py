"""JAX's cache of compiled programs in the user's cache folder, so that the next start compiles nothing."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

from grain_jax import __version__


def use() -> None:
    """Turns the cache on for this process; call it before the first program is compiled.

    `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false` is no cache.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    # JAX warns of an entry that it cannot read or write, and compiles.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(folder()))


def folder() -> Path:
    """`$XDG_CACHE_HOME/grain_jax/compiled/KEY`, or below ~/.cache; XLA compiles for exactly the processor of KEY."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    # What the instruction set follows from, on x86 and ARM.
    processor = {x for x in lines if x.startswith(("model name", "flags", "Features", "CPU "))}
    described = [platform.machine(), platform.processor(), __version__, *sorted(processor)]
    key = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    return Path(base) / "grain_jax" / "compiled" / key
