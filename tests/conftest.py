"""8 virtual CPU devices for every test, compiled quickly rather than well; set before JAX starts."""

import atexit
import contextlib
import ctypes
import functools
import gc
import os
import shutil
import sys
import tempfile

import pytest

from grain_jax.core import progress
from tests import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Commands that tests start need not compile the modules of the checkout each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", compiling.FLAGS)
)
# JAX's folder of compiled programs, for this session: xdist's processes and the tests' commands inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grain_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# How long compiling takes is no matter of the code: tests that read stderr see no line about it.
progress.COMPILING_SECONDS = 1e6

# Tracing makes millions of objects that live for seconds; those of the modules live for ever.
gc.set_threshold(50_000, 10, 10)


def pytest_collection_finish():
    """What the modules hold is never garbage: it need not be looked through again."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def memory_of_a_file(request):
    """What a file traced and cached goes with it; its programs stay in JAX's folder."""
    yield
    for value in vars(request.module).values():
        if isinstance(value, functools._lru_cache_wrapper):
            if value.__module__ == request.module.__name__:
                value.cache_clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    gc.freeze()  # what a library imported since is no garbage either
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps what is freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module")
def one_device():
    """JAX has one device until the end of the file: a program for it compiles in half the time."""
    import jax

    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: device)
        yield


def pytest_collection_modifyitems(items):
    """Files marked `long` come first: what starts last, ends last."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
