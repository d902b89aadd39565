"""from-hf, from-open-clip, from-torch and from-big-vision against files that anyone may have made."""

import dataclasses
import io
import json
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from etils import epath

torch = pytest.importorskip("torch")
import safetensors.numpy  # noqa: E402

from grain_jax.convert import archives, torchscript  # noqa: E402
from grain_jax.convert.__main__ import main  # noqa: E402
from grain_jax.convert.faults import ConvertError  # noqa: E402
from grain_jax.convert.reference import names  # noqa: E402
from tests import perturbed  # noqa: E402
from tests.hostile import cases  # noqa: E402


def save(path, state):
    safetensors.numpy.save_file(state, path)


def program(data, content, compression=zipfile.ZIP_STORED):
    """A TorchScript archive with that data.pkl and those bytes of arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/data/0", content)
    return out.getvalue()


ARRAY = torch.zeros(1 << 20, dtype=torch.float64)
PT = [  # what is in the file; the line
    (lambda: {"a": torch.zeros(1).expand(10**6, 10**6)}, "its arrays take more than"),
    (lambda: {f"a{i}": ARRAY for i in range(100)}, "its arrays take more than"),
    (lambda: program(b"N.", bytes(128 << 20), zipfile.ZIP_DEFLATED), "its members unpack to"),
]


@pytest.mark.parametrize("build, line", PT, ids=["expanded", "repeated", "a bomb"])
def test_from_open_clip(tmp_path, build, line):
    content, path = build(), tmp_path / "m.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    run("from-open-clip", path, tmp_path / "out", line)


def run(command, source, out, line):
    cases.check(cases.run(main, [command, "--input", source, "--output", out]), line)
    assert not out.exists()


@pytest.mark.parametrize(
    "tower, key, value, line",
    [
        ("image", "depth", 10**12, "image.depth"),
        ("text", "vocab_size", 10**12, "text.vocab_size|values, its files have"),
        ("text", "tokenizer", "../../etc/passwd", "got '../../etc/passwd', expected clip or"),
        ("text", "tokenizer", "gs://none/t.json", "got 'gs://none/t.json', expected clip"),
    ],
)
def test_from_hf(tmp_path, tower, key, value, line):
    model = perturbed.tiny()
    states = names.state_dicts(perturbed.params(model))
    state = {f"{m}.{n}": x for m, state in states.items() for n, x in state.items()}
    save(tmp_path / "model.safetensors", state)
    towers = dataclasses.asdict(model)
    towers[tower][key] = value
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "grain", "towers": towers}))
    run("from-hf", tmp_path, tmp_path / "out", line)


def npy(shape, dtype="<f4", content=b"\0" * 16):
    """An array's file that says whatever."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + content


def npz(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def npz_bomb():
    """128 MB of zeros, compressed to 128 KB."""
    return npz([("a.npy", npy((32 << 20,), content=bytes(128 << 20)))], zipfile.ZIP_DEFLATED)


NPZ = [
    ("a bomb", npz_bomb, "its members unpack to 134,217,\\d+ bytes, expected at most"),
    ("a shape of 10^15", lambda: npz([("a.npy", npy((10**15,)))]), "a: its header declares|not a .npz"),
    ("objects", lambda: npz([("a.npy", npy((2,), "|O"))]), "not a .npz of plain arrays"),
    ("a header of code", lambda: npz([("a.npy", b"\x93NUMPY\x01\0\x10\0__import__('os')")]), "not a .npz of plain arrays"),
    ("a million layers", lambda: npz([("img/Transformer/encoderblock/x.npy", npy((10**6,), "|i1", bytes(10**6)))], zipfile.ZIP_DEFLATED), "expected 1 to 1000 layers"),
]  # fmt: skip


@pytest.mark.parametrize("make, line", [row[1:] for row in NPZ], ids=[row[0] for row in NPZ])
def test_from_big_vision(tmp_path, make, line):
    (tmp_path / "m.npz").write_bytes(make())
    run("from-big-vision", tmp_path / "m.npz", tmp_path / "out", line)


def test_a_member_that_unpacks_to_more_than_it_says_is_damage(tmp_path):
    whole = bytearray(npz([("a.npy", npy((4,)) + b"\0" * 4000)], zipfile.ZIP_DEFLATED))
    length = struct.pack("<L", len(npy((4,))) + 4000)
    said = struct.pack("<L", len(npy((4,))))
    assert whole.count(length) == 2
    (tmp_path / "m.npz").write_bytes(bytes(whole).replace(length, said))
    with pytest.raises(ConvertError, match="BadZipFile"):
        archives.read_npz(epath.Path(tmp_path / "m.npz"))


def test_a_program_that_asks_for_one_storage_many_times(tmp_path):
    """100,000 times the same 1 MB, in a pickle of 3 MB."""
    storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\0\0\4\0t"
    dropped = (
        b"h\0h\1K\0J\0\0\4\0\x85K\1\x85tR0"  # _rebuild_tensor_v2(storage, 0, (n,), (1,)), dropped
    )
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\0(" + storage + b"Qq\x010"
    data += b"".join(b"h\0(" + dropped[2:] for _ in range(1000)) + b"N."
    (tmp_path / "m.pt").write_bytes(program(data, bytes(1 << 20)))
    with pytest.raises(ConvertError, match="its arrays take more than"):
        archives.read_weights(epath.Path(tmp_path / "m.pt"), ())


BEYOND = [  # offset, size, stride; the last would ask for more memory than there is
    (3, (10,), (1,)),
    (-1, (2,), (1,)),
    (0, (10**15,), (0,)),
]


@pytest.mark.parametrize("position", BEYOND)
def test_a_tensor_beyond_its_numbers_is_refused(position):
    with pytest.raises(pickle.UnpicklingError, match="reaches beyond its numbers"):
        torchscript._tensor(np.zeros(12, np.float32), *position)


def test_modules_that_hold_themselves_take_the_memory_of_one_level():
    names = [f"{number:x}" for number in range(50)] + ["L" * 10_000]
    entries = b"".join(b"X" + struct.pack("<I", len(x)) + x.encode() + b"h\0" for x in names)
    data = b"\x80\2c__torch__\nM\n)\x81q\0}(" + entries + b"ub."
    file = io.BytesIO(program(data, b""))
    tracemalloc.start()
    with pytest.raises(ConvertError, match="its modules hold each other without end"):
        torchscript.read(file, lambda count: None)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
