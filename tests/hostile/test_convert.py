"""from-hf, from-open-clip, from-torch and from-big-vision against files that anyone may have made."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import safetensors.numpy  # noqa: E402

from grain_jax.convert import archives, formats, tables, torchscript  # noqa: E402
from grain_jax.convert.__main__ import main  # noqa: E402
from grain_jax.convert.big_vision import checkpoint as big_vision  # noqa: E402
from grain_jax.convert.faults import ConvertError  # noqa: E402
from grain_jax.convert.open_clip import checkpoint as open_clip  # noqa: E402
from grain_jax.convert.reference import names  # noqa: E402
from grain_jax.models import grain  # noqa: E402
from tests import perturbed  # noqa: E402
from tests.hostile import cases  # noqa: E402

F, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = dict(image_size=8, width=16, patch_size=4, depth=2, heads=2, mlp_dim=64)
CLIP = dict(qk_norm=False, pre_norm=True, patch_bias=False, pool="class")
WORDS = dict(vocab_size=30, context_length=8, width=16, depth=2, heads=2, mlp_dim=64)


def save(path, state):
    safetensors.numpy.save_file(state, path)


def clip_state():
    """A CLIP of open_clip's names, of random numbers."""
    changes = {f"image__{k}": v for k, v in (SIZES | CLIP).items()}
    changes |= {f"text__{k}": v for k, v in WORDS.items()}
    params = perturbed.params(perturbed.tiny(decoder=None, embed_dim=12, **changes))
    rows = [
        *formats.openai_image(),
        *formats.openai_text(),
        tables.NamePair("logit_scale", "logit_scale"),
    ]
    return tables.write(rows, grain.flat(params))


STATE = clip_state()
VISION = dict(image_size=8, layers=2, width=16, head_width=8, patch_size=4)
TEXT = dict(context_length=8, vocab_size=30, width=16, heads=2, layers=2)


def config(**changes):
    """open_clip_config.json; `vision__width=1` changes a group's."""
    cfg = {"embed_dim": 12, "vision_cfg": dict(VISION), "text_cfg": dict(TEXT)}
    for key, value in changes.items():
        group, name = key.split("__")
        cfg[f"{group}_cfg"][name] = value
    return with_files(open_clip_config__json=json.dumps({"model_cfg": cfg}))


# Each changes a folder with good weights. `__` stands for the dot of a name.
def with_files(**contents):
    def make(folder):
        for name, content in contents.items():
            content = content if isinstance(content, bytes) else content.encode()
            (folder / name.replace("__", ".")).write_bytes(content)

    return make


def with_state(**changes):
    def make(folder):
        state = safetensors.numpy.load_file(folder / F)
        state |= {key.replace("__", "."): value for key, value in changes.items()}
        save(folder / F, {k: v for k, v in state.items() if v is not None})

    return make


def with_index(weight_map, *, prepare=lambda folder: None):
    def make(folder):
        (folder / F).rename(folder / "part.safetensors")
        prepare(folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return make


def with_pt(build):
    def make(folder):
        (folder / F).unlink()
        value = build()
        if isinstance(value, bytes):
            (folder / "pytorch_model.bin").write_bytes(value)
        else:
            torch.save(value, folder / "pytorch_model.bin")

    return make


def without(name, then=lambda path: None):
    def make(folder):
        (folder / name).unlink()
        then(folder / name)

    return make


def a_dict_that_holds_itself():
    out = {}
    out["state_dict"] = out
    return out


def pickled(build):
    """A pickle of modules: each names itself __torch__.M and has a dict as its state."""
    out, memo = bytearray(b"\x80\x02"), {}

    def module(attributes):
        key = id(attributes)
        if key in memo:
            out.extend(b"j" + struct.pack("<I", memo[key]))
            return
        memo[key] = 1000 + len(memo)
        out.extend(b"c__torch__\nM\n)\x81r" + struct.pack("<I", memo[key]) + b"}")
        for name, value in attributes.items():
            out.extend(b"X" + struct.pack("<I", len(name)) + name.encode())
            module(value)
            out.extend(b"s")
        out.extend(b"b")

    module(build())
    return bytes(out) + b"."


def program(data, compression=zipfile.ZIP_STORED, **members):
    """A TorchScript archive with that data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"m/data/{name}", content)
    return out.getvalue()


def cyclic_modules():
    top = {}
    top |= {"a": top, "b": top}
    return top


def shared_modules():
    """A graph of 60 modules with 2^60 ways through it."""
    below = {}
    for _ in range(60):
        below = {"a": below, "b": below}
    return below


def zip_bomb():
    """128 MB of zeros in 128 KB, compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", b"N.")
        with archive.open("m/data/0", "w") as member:
            for _ in range(16):
                member.write(bytes(8 << 20))
    return out.getvalue()


def expanded():
    """Of one number, 10^12 times."""
    return {"token_embedding.weight": torch.zeros(1).expand(10**6, 10**6)}


def repeated():
    """100 names of one array of 8 MB, saved once."""
    array = torch.zeros(1 << 20, dtype=torch.float64)
    return {f"a{i}": array for i in range(100)}


def link_out(folder):
    (folder.parent / "elsewhere").mkdir()
    save(folder.parent / "elsewhere" / "secret.safetensors", STATE)
    (folder / "link.safetensors").symlink_to(folder.parent / "elsewhere" / "secret.safetensors")


DEEP = "[" * 200_000 + "]" * 200_000

OPEN_CLIP = [
    # weights
    ("nothing there", without(F), "holds no weights; expected one of model.safetensors"),
    ("a FIFO", without(F, os.mkfifo), "holds no weights"),
    ("empty", with_files(**{F: b""}), "not a whole safetensors file"),
    ("noise", with_files(**{F: bytes(range(256)) * 9}), "not a whole safetensors"),
    ("a header of 2^63 bytes", lambda f: (f / F).write_bytes(b"\xff" * 7 + b"\x7f{}"), "not a whole"),
    ("a deep header", lambda f: (f / F).write_bytes(struct.pack("<Q", len(DEEP)) + DEEP.encode()), "not a whole"),
    ("no arrays", lambda f: save(f / F, {}), "no image tower"),
    ("an array of no numbers", with_state(ln_final__weight=np.zeros((0, 10**9), np.float32)), "ln_final.weight"),
    ("NaN", with_state(ln_final__weight=np.full(16, np.nan, np.float32)), "ln_final.weight: holds values that are not finite"),
    ("a scale that is infinite", with_state(logit_scale=np.array(np.inf, np.float32)), "logit_scale: got inf"),
    ("missing", with_state(ln_final__bias=None), "ln_final.bias: missing"),
    ("as many numbers of another shape", with_state(transformer__resblocks__1__attn__out_proj__weight=np.zeros(256, np.float32)), "attn.out_proj.weight: got shape .256,., expected .16, 16."),
    ("unknown", with_state(evil=np.zeros(3, np.float32)), "evil: unknown key"),
    ("another shape", with_state(text_projection=np.zeros((3, 12), np.float32)), "text_projection: got"),
    ("6 positions", with_state(visual__positional_embedding=np.zeros((6 + 1, 16), np.float32)), "got 7 positions, expected a square"),
    ("layer 10^9", with_state(**{"transformer__resblocks__1000000000__x": np.zeros(1, np.float32)}), "no such layer|resblocks.1000000000.x: unknown key"),
    ("a layer with a gap", with_state(**{"transformer__resblocks__5__ln_1__bias": np.zeros(16, np.float32)}), "resblocks.2.ln_1.weight: missing"),
    ("16 bits of whole numbers", with_state(ln_final__bias=np.zeros(16, np.int16)), "got I16, expected one of"),
    # the index
    ("an index that leaves", with_index({"a": "../part.safetensors"}), "names the file '../part.safetensors', expected one beside it"),
    ("an absolute index", with_index({"a": "/etc/passwd"}), "names the file '/etc/passwd'"),
    ("an index that links out", with_index({"a": "link.safetensors"}, prepare=link_out), "a link to elsewhere"),
    ("an index of numbers", with_index({"a": 3}), "index.json: Expected `.*, expected transformers' index, with the key weight_map"),
    ("an index of itself", with_index({"a": INDEX}), "not a whole safetensors file"),
    ("an index with a NUL", with_index({"a": "a\0b"}), "names the file"),
    # config.json and its like
    ("JSON that is none", with_files(open_clip_config__json="{"), "open_clip_config.json: .*, expected a JSON object"),
    ("JSON of a list", with_files(config__json="[1]"), "config.json: Expected `object`, got `array`"),
    ("deep JSON", with_files(config__json=f'{{"a": {DEEP}}}'), "config.json: nested too deep"),
    ("a number of 10,000 digits", with_files(config__json='{"a": ' + "9" * 10_000 + "}"), "config.json: .*, expected a JSON object|config.json: .*, expected to-hf"),
    ("a model_type of a number", with_files(config__json='{"model_type": 3}'), "model_type: got 3, expected a text"),
    ("pixels of texts", with_files(preprocessor_config__json='{"image_mean": ["a", 1, 2], "image_std": [1, 1, 1]}'), "image_mean: got"),
    ("pixels without spread", with_files(preprocessor_config__json='{"image_mean": [1, 2, 3], "image_std": [0, 0, 0]}'), "pixel_std"),
    ("model_cfg of a list", with_files(open_clip_config__json='{"model_cfg": [1]}'), "model_cfg: got .*, expected an object"),
    ("a width of a text", config(vision__width="16"), "vision_cfg.width: got 16, expected a whole number"),
    ("a head of 0", config(vision__head_width=0), "vision_cfg.head_width: got 0"),
    ("heads that do not divide", config(text__heads=5), "text heads: got 5, expected a divisor"),
    ("an epsilon of NaN", config(vision__norm_kwargs={"eps": float("nan")}), "open_clip_config.json: JSON is malformed"),
    ("an unknown pool", config(vision__pool_type="magic"), "magic"),
    ("10^5 layers", config(text__layers=100_000), "text_cfg.layers: got 100000, but the arrays have 2"),
    ("10^12 words", config(text__vocab_size=10**12), "vocab_size: got 1000000000000, expected at most"),
    ("another place's tower", config(text__hf_model_name="evil/repo"), "text_cfg.hf_model_name"),
    ("another place's trunk", config(vision__timm_model_name="hf-hub:evil/repo"), "timm_model_name: got 'hf-hub:evil/repo'"),
    # pickles and programs
    ("a dict that holds itself", with_pt(a_dict_that_holds_itself), "got a dict, expected a state dict of tensors"),
    ("sparse", with_pt(lambda: {"a": torch.eye(3).to_sparse()}), "a: got .*sparse.*, expected plain numbers"),
    ("complex", with_pt(lambda: {"a": torch.zeros(2, dtype=torch.complex64)}), "a: got torch.complex64"),
    ("without storage", with_pt(lambda: {"a": torch.zeros(2, device="meta")}), "a: got|not a checkpoint"),
    ("10^12 times one number", with_pt(expanded), "its arrays take more than"),
    ("one array 100 times", with_pt(repeated), "its arrays take more than"),
    ("names twice", with_pt(lambda: {"a": torch.zeros(2), "module.a": torch.zeros(2)}), "a: is there with and without module"),
    ("a bomb", with_pt(zip_bomb), "its members unpack to"),
    ("modules that hold themselves", with_pt(lambda: program(pickled(cyclic_modules))), "hold each other without end"),
    ("modules that are shared", with_pt(lambda: program(pickled(shared_modules))), "hold each other without end"),
    ("a far memo", with_pt(lambda: program(b"\x80\x02Nr\xff\xff\xff\x7f.")), "not a checkpoint of plain tensors"),
    ("noise in .bin", with_pt(lambda: bytes(range(256)) * 9), "not a checkpoint of plain tensors"),
]  # fmt: skip


@pytest.mark.parametrize(
    "make, line", [row[1:] for row in OPEN_CLIP], ids=[r[0] for r in OPEN_CLIP]
)
def test_from_open_clip(tmp_path, make, line):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / F, STATE)
    make(tmp_path / "in")
    run("from-open-clip", tmp_path / "in", tmp_path / "out", line)


def run(command, source, out, line):
    cases.check(cases.run(main, [command, "--input", source, "--output", out]), line)
    assert not out.exists()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A folder of to-hf, as far as from-hf reads it."""
    folder, model = tmp_path_factory.mktemp("hf"), perturbed.tiny()
    states = names.state_dicts(perturbed.params(model))
    save(folder / F, {f"{m}.{n}": x for m, state in states.items() for n, x in state.items()})
    towers = dataclasses.asdict(model)
    (folder / "config.json").write_text(json.dumps({"model_type": "grain", "towers": towers}))
    return folder


def rewritten(**changes):
    """config.json with other values of towers; `image__width=1` changes a tower's."""

    def make(folder):
        value = json.loads((folder / "config.json").read_text())
        for key, new in changes.items():
            *groups, name = key.split("__")
            at = value["towers"]
            for group in groups:
                at = at[group]
            at[name] = new
        (folder / "config.json").write_text(json.dumps(value))

    return make


def config_of(content):
    return with_files(config__json=content)


FROM_HF = [
    ("no config", without("config.json"), "got no weights of transformers; grain-jax convert from-open-clip"),
    ("a config that is a folder", without("config.json", os.mkdir), "got no weights of transformers"),
    ("a deep config", config_of(f'{{"towers": {DEEP}}}'), "config.json: nested too deep"),
    ("a config of a list", config_of("[]"), "got `array`"),
    ("no towers", config_of("{}"), "got no weights of transformers"),
    ("towers of a text", config_of('{"towers": "x"}'), "got no sizes under towers"),
    ("towers of nothing", config_of('{"towers": {}}'), "model"),
    ("a tower of null", rewritten(image=None), "model.image"),
    ("no decoder", rewritten(decoder=None), "model.image.pool: got none without model.decoder"),
    ("a width of a list", rewritten(image__width=[[48]]), "model.image.width"),
    ("a width of NaN", rewritten(image__width=float("nan")), "config.json: JSON is malformed"),
    ("a width of 10^30", rewritten(image__width=10**30), "model.image|got shape"),
    ("10^12 layers", rewritten(image__depth=10**12), "model.image|layers, expected at most"),
    ("3 layers", rewritten(image__depth=3), "visual.blocks.2.*: missing"),
    ("10^12 words", rewritten(text__vocab_size=10**12), "model.text|got shape"),
    ("a tokenizer elsewhere", rewritten(text__tokenizer="../../etc/passwd"), "tokenizer: got '../../etc/passwd', expected clip or"),
    ("a tokenizer of a store", rewritten(text__tokenizer="gs://none/t.json"), "tokenizer: got 'gs://none/t.json', expected clip"),
    ("a misspelt key", rewritten(image__witdh=48), "model.image.witdh: no such key; did you mean model.image.width"),
    ("heads that the qk-norms have not", rewritten(image__heads=6), "attn.q_norm.weight: got shape .12,., expected .8,."),
    ("no weights", without(F), f"{F}: no such file"),
    ("an unknown array", with_state(evil=np.zeros(3, np.float32)), "evil: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize("make, line", [row[1:] for row in FROM_HF], ids=[r[0] for r in FROM_HF])
def test_from_hf(hf, tmp_path, make, line):
    shutil.copytree(hf, tmp_path / "in")
    make(tmp_path / "in")
    run("from-hf", tmp_path / "in", tmp_path / "out", line)


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
    ("a shape of 10^15", lambda: npz([("a.npy", npy((10**15,)))]), "a: got shape \\(1000000000000000,\\)"),
    ("a shape of 10^30", lambda: npz([("a.npy", npy((10**15, 10**15)))]), "a: got shape"),
    ("a negative shape", lambda: npz([("a.npy", npy((-4,)))]), "a: got shape \\(-4,\\)"),
    ("objects", lambda: npz([("a.npy", npy((2,), "|O"))]), "a: got object, expected an array of numbers"),
    ("texts", lambda: npz([("a.npy", npy((2,), "<U2"))]), "a: got <U2"),
    ("complex", lambda: npz([("a.npy", npy((2,), "<c8"))]), "a: got complex64"),
    ("twice the same", lambda: npz([("a.npy", npy((4,))), ("a.npy", npy((4,)))]), "members of the same name"),
    ("no array", lambda: npz([("a.txt", b"hello there, all of you")]), "not a .npz of plain arrays"),
    ("a header of code", lambda: npz([("a.npy", b"\x93NUMPY\x01\0\x10\0__import__('os')")]), "not a .npz of plain arrays"),
    ("version 3", lambda: npz([("a.npy", b"\x93NUMPY\x03\0" + b"\0" * 20)]), "got version \\(3, 0\\)"),
    ("an .npy", lambda: npy((4,)), "not a .npz of plain arrays"),
    ("empty", lambda: b"", "not a .npz of plain arrays"),
    ("nothing in it", lambda: npz([]), "no|missing|expected"),
    ("layers that are a scalar", lambda: npz([("img/Transformer/encoderblock/x.npy", npy((), content=b"\0" * 4))]), "encoderblock/x: got shape \\(\\), expected 1 to 1000 layers"),
    ("a million layers", lambda: npz([("img/Transformer/encoderblock/x.npy", npy((10**6,), "|i1", bytes(10**6)))], zipfile.ZIP_DEFLATED), "expected 1 to 1000 layers"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
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
        big_vision.read(tmp_path / "m.npz")


def test_arrays_of_npz_are_numpys(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.normal(size=(2, 3)).astype(np.float32),
        "columns": np.asfortranarray(rng.normal(size=(2, 3))),
        "half": rng.normal(size=3).astype(np.float16),
        "whole": np.arange(4),
        "none": np.zeros((0, 3)),
        "scalar": np.float64(2.5),
        "bits": np.array([True, False]),
    }
    for save_as in (np.savez, np.savez_compressed):
        save_as(tmp_path / "m.npz", **arrays)
        found = archives.read_npz(open_clip.epath.Path(tmp_path / "m.npz"))
        assert found.keys() == arrays.keys()
        for name, array in found.items():
            assert array.dtype == np.float32 and array.shape == np.shape(arrays[name])
            np.testing.assert_array_equal(array, np.asarray(arrays[name], np.float32))


def test_links_of_hugging_faces_cache_are_followed(tmp_path):
    folder, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save(blobs / "123", STATE)
    (folder / "part.safetensors").symlink_to("../../blobs/123")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "part.safetensors"}}'
    )
    assert open_clip.read(folder).state.keys() == STATE.keys()


def test_a_program_that_asks_for_one_storage_many_times(tmp_path):
    """100,000 times the same 1 MB, in a pickle of 3 MB."""
    storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\0\0\4\0t"
    one = b"h\0h\1K\0J\0\0\4\0\x85K\1\x85tR0"  # _rebuild_tensor_v2(storage, 0, (n,), (1,)), dropped
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\0(" + storage + b"Qq\x010"
    data += b"".join(b"h\0(" + one[2:] for _ in range(1000)) + b"N."
    (tmp_path / "m.pt").write_bytes(program(data, **{"0": bytes(1 << 20)}))
    with pytest.raises(ConvertError, match="its arrays take more than"):
        open_clip.read(tmp_path / "m.pt")


BEYOND = [  # offset, size, stride; the last would ask for more memory than there is
    (0, (13,), (1,)),
    (3, (10,), (1,)),
    (-1, (2,), (1,)),
    (4, (2,), (-1,)),
    (0, (10**15,), (0,)),
]


@pytest.mark.parametrize("place", BEYOND)
def test_a_tensor_beyond_its_numbers_is_refused(place):
    with pytest.raises(pickle.UnpicklingError, match="reaches beyond its numbers"):
        torchscript._tensor(np.zeros(12, np.float32), *place)


def test_modules_that_hold_themselves_take_the_memory_of_one_level():
    names = [f"{number:x}" for number in range(50)] + ["L" * 10_000]
    entries = b"".join(b"X" + struct.pack("<I", len(x)) + x.encode() + b"h\0" for x in names)
    program = b"\x80\2c__torch__\nM\n)\x81q\0}(" + entries + b"ub."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/constants.pkl", b"\x80\2).")
    file.seek(0)
    tracemalloc.start()
    with pytest.raises(ConvertError, match="its modules hold each other without end"):
        torchscript.read(file)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
