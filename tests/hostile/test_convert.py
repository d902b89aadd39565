"""from-hf, from-open-clip and from-big-vision against files that anyone made: one line, and no output."""

import dataclasses
import io
import json
import struct
import zipfile

import pytest

torch = pytest.importorskip("torch")
import safetensors.numpy  # noqa: E402

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


def saved(state):
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def npy(shape, dtype="<f4", content=b"\0" * 16):
    """An array's file whose header may be wrong."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + content


def says_less_than_it_unpacks_to():
    whole = zipped({"a.npy": npy((4,)) + b"\0" * 4000}, DEFLATED)
    return whole.replace(struct.pack("<L", len(npy((4,))) + 4000), struct.pack("<L", len(npy((4,)))))


FILES = {  # name -> (suffix of the file, its content, the line)
    "expanded": (".bin", lambda: saved({"a": torch.zeros(1).expand(10**6, 10**6)}), TOO_LARGE),
    "repeated": (".bin", lambda: saved({f"a{i}": ARRAY for i in range(100)}), TOO_LARGE),
    "a program": (".bin", lambda: zipped({"m/constants.pkl": b"N."}), "a TorchScript archive"),
    "a bomb": (".bin", lambda: zipped({"m/data/0": bytes(128 << 20)}, DEFLATED), "its members unpack to"),
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
    safetensors.numpy.save_file(names.state_dict(perturbed.params(model)), tmp_path / "model.safetensors")
    towers = dataclasses.asdict(model)
    towers[tower][key] = value
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "grain", "towers": towers}))
    run("from-hf", tmp_path, tmp_path / "out", line)
