"""Digests of states: the same numbers as in plain integers, on any mesh."""

import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grain_jax.checkpoint import digests


class State(NamedTuple):
    params: Any
    opt_state: Any
    ema_params: Any


def _state(mesh, params):
    spec = {"a": PartitionSpec("fsdp", None, "tensor"), "b": PartitionSpec(("data", "fsdp"))}
    put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    placed = {k: put(v, spec[k]) for k, v in params.items()}
    return State(placed, {"m": placed["a"]}, {})


def test_a_states_digest_is_that_of_plain_integers_on_any_mesh():
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(4, 3, 2)).astype(np.float32),
        "b": rng.normal(size=8).astype(jax.numpy.bfloat16),
    }
    total = 0
    for name, x in params.items():
        keys = []
        for axis, size in enumerate(x.shape):
            stream = np.random.Philox(key=(zlib.crc32(f"['{name}']".encode()) << 8) + axis)
            keys.append([int(k) | 1 for k in stream.random_raw(size)])
        bits = x.view(f"u{x.dtype.itemsize}")
        for index in np.ndindex(x.shape):
            term = int(bits[index])
            for axis, i in enumerate(index):
                term *= keys[axis][i]
            total += term
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 1)):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
        found = digests.of_state(_state(mesh, params))
        assert found["params"] == f"{total % 2**64:016x}", sizes
        assert sorted(found) == ["opt_state", "params"]
    assert digests.of_arrays(params) == found["params"]
    changed = {k: v.copy() for k, v in params.items()}
    changed["a"][[0, 1]] = changed["a"][[1, 0]]  # rows exchanged
    other = digests.of_state(_state(mesh, changed))
    assert other["params"] != found["params"] and other["opt_state"] != found["opt_state"]
