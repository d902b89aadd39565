"""The compilation cache: what XLA compiled lies in the user's cache folder, and the next start reads it.

JAX asks the cache and this module stores, as JAX's own store reads what a kill or a bad disk left of an entry, waits at
a pipe in its place, and never replaces it.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface
from jaxlib import version

from grain_jax import __version__
from grain_jax.core import atomic, regular_file

MAX_BYTES = (
    2 << 30
)  # of all machines and versions; where there are more, those not used for longest go
_DIGEST_BYTES = 32


def use(wanted: bool = True) -> None:
    """Turns the cache on for this process; call it before the first program is compiled.

    What the user set for JAX comes first: `JAX_COMPILATION_CACHE_DIR` (that folder, in JAX's own form),
    `JAX_ENABLE_COMPILATION_CACHE=false` and `JAX_COMPILATION_CACHE_MAX_SIZE`. A folder that cannot be written is
    no cache, without a word.

    Args:
      wanted: False turns it off, the user's too.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"] or settings["jax_compilation_cache_dir"]:
        return
    try:
        place = folder()
    except (RuntimeError, OSError):  # there is no home
        return
    # JAX warns of an entry that it cannot read, and compiles.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    compilation_cache.get_file_cache = lambda path: (Store(Path(path)), path)
    jax.config.update("jax_compilation_cache_dir", str(place))
    # Of programs alone: XLA's caches for GPUs check nothing.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def folder() -> Path:
    """`$XDG_CACHE_HOME/grain_jax/compiled/KEY`, or below ~/.cache; KEY is of this processor and the versions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    # What the instruction set follows from, on x86 and ARM: XLA compiles for exactly this processor.
    of_cpu = {x for x in lines if x.startswith(("model name", "flags", "Features", "CPU "))}
    versions = (__version__, jax.__version__, version.__version__)
    told = [platform.machine(), platform.processor(), *versions, *sorted(of_cpu)]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    return Path(base) / "grain_jax" / "compiled" / key


class Store(CacheInterface):
    """Entries as files: the SHA-256 of a program, and the program. A file that is anything else is removed.

    An entry that JAX could not load (it compiles the program again, then) is replaced by an empty one, so that it does
    not try at each start.
    """

    def __init__(self, path: Path):
        self._path = path
        self._given: set[str] = set()

    def get(self, key: str) -> bytes | None:
        """The program of the key, or None."""
        path = self._path / key
        with contextlib.suppress(OSError):
            try:
                content = regular_file.read(path, MAX_BYTES, "a compiled program")
                digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
                if hashlib.sha256(program).digest() == digest:
                    self._given.add(key)
                    with contextlib.suppress(OSError):  # of another user
                        path.touch()
                    return program or None
            except regular_file.FileError:
                pass
            path.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps the program of the key, and removes those that are too much."""
        if key in self._given:
            value = b""
        with contextlib.suppress(OSError):
            self._path.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(self._path / key, hashlib.sha256(value).digest() + value)
            most, size = jax.config.values["jax_compilation_cache_max_size"], 0
            found = [(os.stat(path), path) for path in self._path.parent.glob("*/*")]
            for stat, path in sorted(found, key=lambda x: x[0].st_mtime, reverse=True):
                size += stat.st_size
                if size > (MAX_BYTES if most < 0 else most):
                    path.unlink(missing_ok=True)
