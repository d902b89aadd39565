"""from-hf, from-open-clip and from-big-vision against files that anyone made: one line, and no output."""

import dataclasses
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import safetensors.numpy  # noqa: E402

from grain_jax.convert import torchscript  # noqa: E402
from grain_jax.convert.__main__ import main  # noqa: E402
from grain_jax.convert.reference import names  # noqa: E402
from tests import perturbed  # noqa: E402
from tests.hostile import cases  # noqa: E402

DEFLATED = zipfile.ZIP_DEFLATED
ARRAY = torch.zeros(1 << 20, dtype=torch.float64)
LAYERS = "img/Transformer/encoderblock/x.npy"
TOO_LARGE = "its arrays take more than"


def zipped(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def program(data, content, compression=zipfile.ZIP_STORED):
    """A TorchScript archive with that data.pkl and those bytes of arrays."""
    members = {"m/constants.pkl": b"", "m/data.pkl": data, "m/data/0": content}
    return zipped(members, compression)


def saved(state):
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def npy(shape, dtype="<f4", content=b"\0" * 16):
    """An array's file whose header may be wrong."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + content


def one_storage_many_times():
    """100,000 times the same 1 MB, in a pickle of 3 MB."""
    storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\0\0\4\0t"
    again = b"h\0(h\1K\0J\0\0\4\0\x85K\1\x85tR0"  # _rebuild_tensor_v2(storage, 0, (n,), (1,)), dropped
    data = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\nq\0(" + storage + b"Qq\x010"
    return program(data + again * 1000 + b"N.", bytes(1 << 20))


def modules_that_hold_themselves():
    keys = [f"{number:x}" for number in range(50)] + ["L" * 10_000]
    entries = b"".join(b"X" + struct.pack("<I", len(x)) + x.encode() + b"h\0" for x in keys)
    return program(b"\x80\2c__torch__\nM\n)\x81q\0}(" + entries + b"ub.", b"")


def says_less_than_it_unpacks_to():
    whole = zipped({"a.npy": npy((4,)) + b"\0" * 4000}, DEFLATED)
    return whole.replace(struct.pack("<L", len(npy((4,))) + 4000), struct.pack("<L", len(npy((4,)))))


FILES = {  # name -> (suffix of the file, its content, the line)
    "expanded": (".bin", lambda: saved({"a": torch.zeros(1).expand(10**6, 10**6)}), TOO_LARGE),
    "repeated": (".bin", lambda: saved({f"a{i}": ARRAY for i in range(100)}), TOO_LARGE),
    "one storage": (".bin", one_storage_many_times, TOO_LARGE),
    "modules": (".bin", modules_that_hold_themselves, "its modules hold each other without end"),
    "a bomb": (".bin", lambda: program(b"N.", bytes(128 << 20), DEFLATED), "its members unpack to"),
    "bomb": (".npz", lambda: zipped({"a.npy": npy((32 << 20,), content=bytes(128 << 20))}, DEFLATED),
             "its members unpack to"),
    "a shape of 10^15": (".npz", lambda: zipped({"a.npy": npy((10**15,))}),
                         "a: its header declares|not a .npz"),
    "objects": (".npz", lambda: zipped({"a.npy": npy((2,), "|O")}), "not a .npz of plain arrays"),
    "code": (".npz", lambda: zipped({"a.npy": b"\x93NUMPY\x01\0\x10\0__import__('os')"}),
             "not a .npz of plain arrays"),
    "layers": (".npz", lambda: zipped({LAYERS: npy((10**6,), "|i1", bytes(10**6))}, DEFLATED),
               "expected 1 to 1000 layers"),
    "less": (".npz", says_less_than_it_unpacks_to, "BadZipFile"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file(tmp_path, name):
    suffix, content, line = FILES[name]
    (tmp_path / f"m{suffix}").write_bytes(content())
    command = {".bin": "from-open-clip", ".npz": "from-big-vision"}[suffix]
    run(command, tmp_path / f"m{suffix}", tmp_path / "out", line)


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
def test_a_config_of_from_hf(tmp_path, tower, key, value, line):
    model = perturbed.tiny()
    states = names.state_dicts(perturbed.params(model))
    state = {f"{m}.{n}": x for m, state in states.items() for n, x in state.items()}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    towers = dataclasses.asdict(model)
    towers[tower][key] = value
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "grain", "towers": towers}))
    run("from-hf", tmp_path, tmp_path / "out", line)


# Offset, size, stride; the last would need more memory than there is.
@pytest.mark.parametrize("place", [(3, (10,), (1,)), (-1, (2,), (1,)), (0, (10**15,), (0,))])
def test_a_tensor_beyond_its_numbers(place):
    with pytest.raises(pickle.UnpicklingError, match="reaches beyond its numbers"):
        torchscript._tensor(np.zeros(12, np.float32), *place)
