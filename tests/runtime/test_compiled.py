"""The compilation cache: a second process compiles nothing, to the same bits; what is damaged is compiled again."""

import os
import subprocess
import sys

import jax
import pytest

from grain_jax.runtime import compiled
from tests.paths import ROOT

PROGRAM = b"a program of some length"


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "cache/compiled/key"
    compiled.Store(folder).put("name", PROGRAM)
    return compiled.Store(folder), folder / "name"


def _flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"!")


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped byte": _flip,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), os.symlink("/dev/zero", path)),
    "a dead link": lambda path: (path.unlink(), os.symlink("/nowhere", path)),
    "a huge file": lambda path: os.truncate(path, compiled.MAX_BYTES + 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_a_miss_and_replaced(store, damage):
    entries, path = store
    assert entries.get("name") == PROGRAM
    damage(path)
    entries = compiled.Store(path.parent)
    assert entries.get("name") is None
    entries.put("name", PROGRAM)
    assert entries.get("name") == PROGRAM


def test_what_jax_could_not_load_is_not_tried_again(store):
    entries, path = store
    assert entries.get("name") == PROGRAM
    entries.put("name", PROGRAM)  # so it compiled again
    assert compiled.Store(path.parent).get("name") is None


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    entries = compiled.Store(tmp_path / "file/compiled")
    entries.put("name", PROGRAM)
    assert entries.get("name") is None


def test_an_entry_that_cannot_be_touched_is_a_hit(store, monkeypatch):
    entries, path = store

    def denied(self, *_):
        raise PermissionError

    monkeypatch.setattr(type(path), "touch", denied)
    assert entries.get("name") == PROGRAM


def test_those_not_used_for_longest_go(store, monkeypatch):
    entries, path = store
    monkeypatch.setattr(compiled, "MAX_BYTES", 3 * path.stat().st_size)
    other = compiled.Store(path.parent.parent / "another version")
    other.put("a", PROGRAM)
    other.put("b", PROGRAM)
    for number, name in enumerate(("another version/a", "key/name", "another version/b")):
        os.utime(path.parent.parent / name, (number, number))
    assert other.get("a") == PROGRAM  # used
    entries.put("c", PROGRAM)
    assert sorted(p.name for p in path.parent.parent.glob("*/*")) == ["a", "b", "c"]


_PROCESS = """
import sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
if "library" in sys.argv:
    import grain_jax.inference
assert jax.config.jax_compilation_cache_dir is None  # a library leaves the settings of its process
from grain_jax.runtime import compiled
compiled.use("off" not in sys.argv)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
out = jax.jit(lambda x: jnp.tanh(x @ x).sum(0))(jnp.arange(64.0).reshape(8, 8))
count = lambda name: events.count(f"/jax/compilation_cache/cache_{name}")
print(count("hits"), count("misses"), bytes(jax.device_get(out)).hex())
"""


def _run(folder, *arguments, **variables):
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, *arguments],
        env={**own, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    hits, misses, out = done.stdout.split()
    return int(hits), int(misses), out


def test_a_second_process_compiles_nothing_and_computes_the_same_bits(tmp_path):
    cache = tmp_path / "cache"
    hits, programs, out = _run(cache, "library")
    assert hits == 0 and programs > 0
    assert _run(cache) == (programs, 0, out)
    (folder,) = (cache / "grain_jax/compiled").iterdir()
    assert folder.name == compiled.folder().name
    for path in folder.iterdir():
        _flip(path)
    assert _run(cache, "off") == (0, 0, out)
    assert _run(cache) == (0, programs, out)


def test_where_the_user_has_a_cache_it_is_left_alone():
    before = jax.config.jax_compilation_cache_dir
    compiled.use()
    assert jax.config.jax_compilation_cache_dir == before == os.environ["JAX_COMPILATION_CACHE_DIR"]
