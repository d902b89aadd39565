"""The compilation cache: a second process compiles nothing, and JAX's own variables win."""

import os
import subprocess
import sys

import jax

from grain_jax.runtime import compiled
from tests.paths import ROOT

_TWICE = """
import jax
assert jax.config.jax_compilation_cache_dir is None  # a library leaves the settings of its process
from grain_jax.runtime import compiled
compiled.use()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
assert jax.jit(lambda x: x * 3 + 1)(2.0) == 7
print(events.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _TWICE],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        hits, folder = done.stdout.split()
        assert folder.startswith(str(tmp_path / "grain_jax/compiled/")), done.stderr
        said.append(int(hits))
    assert said[0] == 0 and said[1] > 0


def test_the_folder_of_the_user_stays():
    before = jax.config.jax_compilation_cache_dir
    compiled.use()
    assert jax.config.jax_compilation_cache_dir == before == os.environ["JAX_COMPILATION_CACHE_DIR"]
