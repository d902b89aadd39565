"""Digests and records: the same numbers as in plain numpy, on any mesh; records that follow a restart."""

import json
import zlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax.core import schema
from grain_jax.input_pipeline import synthetic
from grain_jax.runtime import digests, receipt
from grain_jax.training import sharding, train_step
from tests import tiny

M = 2**32


def _scramble(x):
    """In Python's own integers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % M
    x = (x ^ x >> 13) * 0xC2B2AE35 % M
    return x ^ x >> 16


def _digest(values, name):
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").ravel().tolist()
    salt = zlib.crc32(name.encode())
    hashes = [_scramble(b ^ _scramble((salt + i) % M)) for i, b in enumerate(bits)]
    return [sum(hashes) % M, sum(_scramble(h ^ 0x9E3779B9) for h in hashes) % M]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(24, dtype=np.int32).reshape(2, 3, 4) - 5,
        np.array([[0.0, -0.0], [1.5, np.nan]], np.float32),
        np.array([True, False, True]),
        np.arange(6, dtype=jax.numpy.bfloat16),
        np.zeros((4, 0, 2), np.int32),
        np.uint32(7),
    ],
    ids=str,
)
def test_an_arrays_digest_is_that_of_plain_integers(values):
    values = np.asarray(values)
    assert np.asarray(digests.of_array(values, "name")).tolist() == _digest(values, "name")


_of_batch = jax.jit(digests.of_batch)


def _placed(batch, mesh):
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.device_put(batch, where)


def test_the_chain_over_batches_is_that_of_plain_integers_on_any_mesh():
    c = tiny.config()
    source = synthetic.batches(c, lanes=range(4))
    first, second = next(source), next(source)
    expected = [[0, 0], [0, 0]]
    for step, batch in enumerate((first, second)):
        fields = batch._asdict()
        image = fields.pop("image").astype(np.uint32)
        del fields["text_counts"], fields["caption_mask"]  # came later than the first receipts
        pixels = image[..., 0] + 256 * image[..., 1] + 65536 * image[..., 2]
        words = [_digest(x, name) for name, x in fields.items() if x is not None]
        examples = [sum(column) % M for column in zip(*words)]
        for chain, digest in zip(expected, (examples, _digest(pixels, "image"))):
            chain[0] = _scramble(_scramble((chain[0] + step) % M) ^ digest[0])
            chain[1] = _scramble((_scramble(chain[1] ^ chain[0]) + digest[1]) % M)

    @jax.jit
    def chains(batches):
        out = np.zeros((2, 2), np.uint32)
        for step, batch in enumerate(batches):
            out = digests.extend(out, digests.of_batch(batch), np.int32(step))
        return out

    for sizes in ((8, 1, 1), (2, 2, 2)):
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(sizes), ("data", "fsdp", "tensor"))
        found = chains([_placed(first, mesh), _placed(second, mesh)])
        assert np.asarray(found).tolist() == expected
    shown = digests.chains(found)
    assert shown["batch_chain"] == f"{expected[0][0]:08x}{expected[0][1]:08x}"
    assert shown["pixel_chain"] == f"{expected[1][0]:08x}{expected[1][1]:08x}"
    swapped = np.asarray(chains([second, first]))
    assert (swapped != np.asarray(found)).all()


@pytest.mark.parametrize(
    "field", [f for f in schema.Batch._fields if f not in ("text_counts", "caption_mask")]
)
def test_every_field_of_a_batch_counts_and_so_does_its_place(field):
    several = dict(input__captions_per_image=3, input__negatives_per_region=2)
    batch = tiny.batch(tiny.config(text__pack_rows=9, **several))
    rng = np.random.default_rng(0)
    rare = [name for name in batch._fields if getattr(batch, name) is None]  # a teacher's, scores
    batch = batch._replace(**{name: rng.random((16, 3), np.float32) for name in rare})
    whole = np.asarray(_of_batch(batch))
    value = getattr(batch, field)
    moved = np.roll(value, 1, axis=-1)
    changed = value.copy()
    last = (-1,) * value.ndim
    changed[last] = not changed[last] if value.dtype == bool else changed[last] + 1
    row = digests.PIXELS if field == "image" else digests.EXAMPLES
    for other in (moved, changed):
        found = np.asarray(_of_batch(batch._replace(**{field: other})))
        assert (found[row] != whole[row]).all() and (found[1 - row] == whole[1 - row]).all()


def _state(mesh, params):
    spec = {"a": PartitionSpec("fsdp", None, "tensor"), "b": PartitionSpec(("data", "fsdp"))}
    put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    placed = {k: put(v, spec[k]) for k, v in params.items()}
    return train_step.TrainState(None, placed, {"m": placed["a"]}, {}, None, None, None)


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
    changed = {k: v.copy() for k, v in params.items()}
    changed["a"][[0, 1]] = changed["a"][[1, 0]]  # rows exchanged
    other = digests.of_state(_state(mesh, changed))
    assert other["params"] != found["params"] and other["opt_state"] != found["opt_state"]


def test_records_are_chained_and_those_beyond_the_restored_step_are_cut(tmp_path):
    c, mesh = tiny.config(), sharding.make_mesh(tiny.config().mesh)
    state = _state(mesh, {"a": np.ones((4, 3, 2), np.float32), "b": np.ones(8, np.float32)})

    def at(step):
        return state._replace(step=np.int32(step), receipt=np.full((2, 2), step, np.uint32))

    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 9)]
    (tmp_path / receipt.FILE).write_text("left by a run that saved nothing\n")
    first = receipt.Receipts(tmp_path, mesh, c, None)
    records = [first.add(at(2), lines[:2]), first.add(at(4), lines[:4])]
    stored = [json.loads(line) for line in receipt.read(tmp_path)]
    assert stored == records
    assert records[0]["previous"] is None
    assert records[1]["previous"] == receipt.sha256(records[0])
    assert records[1]["batch_chain"] == "0000000400000004"
    assert records[1]["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert records[1]["metrics"] == receipt.metrics_sha256(lines[2:4], 0, 99)
    assert set(records[1]) == receipt.Record.__annotations__.keys()

    resumed = receipt.Receipts(tmp_path, mesh, c, records[0])
    again = resumed.add(at(4), lines[:4])
    assert again == records[1]
    assert [json.loads(line)["step"] for line in receipt.read(tmp_path)] == [2, 4]

    copied = tmp_path / "copied"  # only a checkpoint was
    copied.mkdir()
    receipt.Receipts(copied, mesh, c, records[0]).add(at(3), lines[:3])
    chain = [json.loads(line) for line in receipt.read(copied)]
    assert chain[0] == records[0] and chain[1]["previous"] == receipt.sha256(records[0])


def test_the_configs_hash_counts_what_differs_from_the_defaults():
    c = tiny.config()
    stored = json.loads(config_lib.to_json(c))
    for group, key in ((stored, "init"), (stored["optim"], "frozen"), (stored["loss"], "tile")):
        del group[key]  # as before it was a key
    assert config_lib.from_dict(stored) == c
    assert "seed" not in config_lib.without_defaults(c)
    hashes = {
        receipt.config_sha256(tiny.config(**change))
        for change in ({}, {"seed": 1}, {"optim__frozen": ("image/.*",)}, {"init__image": "m.npz"})
    }
    assert len(hashes) == 4
