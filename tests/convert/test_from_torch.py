import math
import os

import numpy as np
import pytest
import torch

import grain_jax
from grain_jax.convert.__main__ import main
from grain_jax.convert.reference import names
from grain_jax.convert.reference.parameters import to_params
from grain_jax.convert.reference.sizes import _heads, infer, sizes_of

# Not the goldens' sizes, and no two alike.
IMAGE, PATCH, EMBED = 40, 8, 28
SIZES = {
    "image": dict(width=36, heads=3, depth=3, mlp=108),
    "text": dict(width=40, heads=5, depth=1, mlp=120, vocab=300, context=32),
    "decoder": dict(width=48, heads=6, depth=2, mlp=144, queries=3),
}
HEADS = ["--image-heads", "3", "--text-heads", "5", "--decoder-heads", "6"]


def made_up(qk_norm=True, seed=0):
    """State dicts as the reference has them, of SIZES, with random values."""
    rng = np.random.default_rng(seed)
    image, text, decoder = SIZES["image"], SIZES["text"], SIZES["decoder"]
    out = {"backbone": {}, "decoder": {}}

    def add(module, name, *shape, around=0.0):
        scale = 0.2 if len(shape) < 2 else 1.2 / math.sqrt(shape[-1])
        out[module][name] = (around + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(module, name, n_out, n_in, bias=True):
        add(module, f"{name}.weight", n_out, n_in)
        if bias:
            add(module, f"{name}.bias", n_out)

    def norm(module, name, size):
        add(module, f"{name}.weight", size, around=1.0)
        add(module, f"{name}.bias", size)

    def torch_attention(module, name, width):
        add(module, f"{name}.in_proj_weight", 3 * width, width)
        add(module, f"{name}.in_proj_bias", 3 * width)
        linear(module, f"{name}.out_proj", width, width)

    e, m = image["width"], "backbone"
    add(m, "visual.cls_token", 1, 1, e)
    add(m, "visual.pos_embed", 1, 1 + (IMAGE // PATCH) ** 2, e)
    add(m, "visual.patch_embed.proj.weight", e, 3, PATCH, PATCH)
    add(m, "visual.patch_embed.proj.bias", e)
    for i in range(image["depth"]):
        block = f"visual.blocks.{i}"
        norm(m, f"{block}.norm1", e)
        norm(m, f"{block}.norm2", e)
        linear(m, f"{block}.attn.qkv", 3 * e, e)
        linear(m, f"{block}.attn.proj", e, e)
        if qk_norm:
            norm(m, f"{block}.attn.q_norm", e // image["heads"])
            norm(m, f"{block}.attn.k_norm", e // image["heads"])
        linear(m, f"{block}.mlp.fc1", image["mlp"], e)
        linear(m, f"{block}.mlp.fc2", e, image["mlp"])
    norm(m, "visual.norm", e)
    add(m, "image_projection", e, EMBED)
    e = text["width"]
    add(m, "token_embedding.weight", text["vocab"], e)
    add(m, "positional_embedding", text["context"], e)
    for i in range(text["depth"]):
        block = f"transformer.resblocks.{i}"
        norm(m, f"{block}.ln_1", e)
        norm(m, f"{block}.ln_2", e)
        torch_attention(m, f"{block}.attn", e)
        linear(m, f"{block}.mlp.c_fc", text["mlp"], e)
        linear(m, f"{block}.mlp.c_proj", e, text["mlp"])
    norm(m, "ln_final", e)
    add(m, "text_projection", e, EMBED)
    out[m]["logit_scale"] = np.array(2.5, np.float32)

    e, m = decoder["width"], "decoder"
    linear(m, "proj", e, image["width"], bias=False)
    norm(m, "transformer.pre_norm", e)
    add(m, "query_embed.weight", decoder["queries"] + 1, e)
    for i in range(decoder["depth"]):
        layer = f"transformer.decoder.layers.{i}"
        for j in (1, 2, 3):
            norm(m, f"{layer}.norm{j}", e)
        torch_attention(m, f"{layer}.self_attn", e)
        torch_attention(m, f"{layer}.multihead_attn", e)
        linear(m, f"{layer}.linear1", decoder["mlp"], e)
        linear(m, f"{layer}.linear2", e, decoder["mlp"])
    norm(m, "transformer.decoder.norm", e)
    for i, n_out in enumerate((e, e, 4)):
        linear(m, f"bbox_embed.layers.{i}", n_out, e)
    add(m, "img_proj", e, EMBED)
    add(m, "obj_proj", e, EMBED)
    add(m, "pos_embed", 1, 17, e)
    add(m, "temporal_embed", 1, 4, e)
    linear(m, "class_embed", 11, e)
    return out


def save(path, states, prefix="module."):
    tensors = {
        module: {prefix + name: torch.from_numpy(array) for name, array in state.items()}
        for module, state in states.items()
    }
    stored = {"epoch": 4, "best_acc": 12.5, "iteration": 99, "optimizer": {"state": {}}}
    stored |= {"state_dict": tensors["decoder"], "backbone_state_dict": tensors["backbone"]}
    torch.save(stored, path)
    return str(path)


class Reference:
    """The reference's forward pass written down in float64 numpy, from its state dicts' names."""

    def __init__(self, states):
        self.states = {
            m: {k: v.astype(np.float64) for k, v in s.items()} for m, s in states.items()
        }

    def use(self, module):
        self.p = self.states[module]
        return self.p

    def norm(self, x, name, eps):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def linear(self, x, name):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def attend(self, q, k, v, causal=False):
        """Heads: [K, n, h] each -> [n, K * h]."""
        logits = np.einsum("knh,kmh->knm", q, k) / math.sqrt(q.shape[-1])
        if causal:
            logits[:, ~np.tri(*logits.shape[1:], dtype=bool)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.concatenate(list(np.einsum("knm,kmh->knh", weights, v)), axis=-1)

    def heads(self, x, count):
        return np.stack(np.split(x, count, axis=-1))

    def attention(self, q, k, v, name, heads, causal=False):
        """torch.nn.MultiheadAttention on [n, E]."""
        weights = np.split(self.p[f"{name}.in_proj_weight"], 3)
        biases = np.split(self.p[f"{name}.in_proj_bias"], 3)
        q, k, v = (self.heads(x @ w.T + b, heads) for x, w, b in zip((q, k, v), weights, biases))
        return self.linear(self.attend(q, k, v, causal), f"{name}.out_proj")

    def image_tokens(self, image):
        """[3, S, S] -> [N, E]."""
        p, heads = self.use("backbone"), SIZES["image"]["heads"]
        kernel = p["visual.patch_embed.proj.weight"]
        grid = range(0, IMAGE, PATCH)
        tokens = [p["visual.cls_token"][0, 0]] + [
            (kernel * image[:, y : y + PATCH, x : x + PATCH]).sum((1, 2, 3))
            + p["visual.patch_embed.proj.bias"]
            for y in grid
            for x in grid
        ]
        x = np.stack(tokens) + p["visual.pos_embed"][0]
        for i in range(SIZES["image"]["depth"]):
            name = f"visual.blocks.{i}"
            y = self.linear(self.norm(x, f"{name}.norm1", 1e-6), f"{name}.attn.qkv")
            q, k, v = (self.heads(part, heads) for part in np.split(y, 3, axis=-1))
            if f"{name}.attn.q_norm.weight" in p:
                q = self.norm(q, f"{name}.attn.q_norm", 1e-6)
                k = self.norm(k, f"{name}.attn.k_norm", 1e-6)
            x = x + self.linear(self.attend(q, k, v), f"{name}.attn.proj")
            y = self.linear(self.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            x = x + self.linear(y, f"{name}.mlp.fc2")
        return self.norm(x, "visual.norm", 1e-6)

    def text(self, ids):
        """[L] -> [D]."""
        p = self.use("backbone")
        x = p["token_embedding.weight"][ids] + p["positional_embedding"][: len(ids)]
        for i in range(SIZES["text"]["depth"]):
            name = f"transformer.resblocks.{i}"
            y = self.norm(x, f"{name}.ln_1", 1e-5)
            x = x + self.attention(y, y, y, f"{name}.attn", SIZES["text"]["heads"], causal=True)
            y = self.linear(self.norm(x, f"{name}.ln_2", 1e-5), f"{name}.mlp.c_fc")
            x = x + self.linear(y / (1 + np.exp(-1.702 * y)), f"{name}.mlp.c_proj")
        return self.norm(x, "ln_final", 1e-5)[ids.argmax()] @ p["text_projection"]

    def regions(self, tokens):
        """[N, E] -> image embedding [D], region embeddings [Q, D], boxes cxcywh [Q, 4]."""
        p, heads = self.use("decoder"), SIZES["decoder"]["heads"]
        memory = self.norm(tokens @ p["proj.weight"].T, "transformer.pre_norm", 1e-5)
        place = p["query_embed.weight"]
        x = np.zeros_like(place)
        for i in range(SIZES["decoder"]["depth"]):
            name = f"transformer.decoder.layers.{i}"
            y = self.norm(x, f"{name}.norm1", 1e-5)
            x = x + self.attention(y + place, y + place, y, f"{name}.self_attn", heads)
            y = self.norm(x, f"{name}.norm2", 1e-5)
            x = x + self.attention(y + place, memory, memory, f"{name}.multihead_attn", heads)
            y = self.linear(self.norm(x, f"{name}.norm3", 1e-5), f"{name}.linear1")
            x = x + self.linear(np.maximum(y, 0), f"{name}.linear2")
        x = self.norm(x, "transformer.decoder.norm", 1e-5)
        boxes = x[:-1]
        for i in range(3):
            boxes = self.linear(boxes, f"bbox_embed.layers.{i}")
            boxes = np.maximum(boxes, 0) if i < 2 else 1 / (1 + np.exp(-boxes))
        return x[-1] @ p["img_proj"], x[:-1] @ p["obj_proj"], boxes


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def close(ours, expected):
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_another_size_gives_the_outputs_of_an_independent_forward(tmp_path, capsys, qk_norm):
    states = made_up(qk_norm)
    path = save(tmp_path / "x.pth.tar", states)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *HEADS]) == 0
    report = capsys.readouterr().out
    assert "parity: PROVEN" in report and "ASSUMED" not in report
    for unused in ("backbone image_projection (36, 28)", "decoder class_embed.bias (11,)"):
        assert unused in report
    total = sum(a.size for s in states.values() for a in s.values())
    assert f"values: {total:,} in the file" in report

    model = grain_jax.load(str(tmp_path / "out"))
    assert model.model.image.image_size == IMAGE and model.model.image.qk_norm == qk_norm
    assert (model.model.text.vocab_size, model.model.text.context_length) == (300, 32)
    assert model.model.decoder.queries == 3 and model.model.embed_dim == EMBED

    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, IMAGE, IMAGE, 3)).astype(np.float32)
    ids = rng.integers(1, 298, (4, 32))
    for row, length in enumerate((2, 9, 31, 32)):
        ids[row, 0], ids[row, length - 1], ids[row, length:] = 298, 299, 0
    reference = Reference(states)
    expected = [
        reference.regions(reference.image_tokens(p.transpose(2, 0, 1).astype(np.float64)))
        for p in images
    ]
    image, region, boxes = (np.stack(x) for x in zip(*expected))
    regions = model.encode_regions(images)
    close(model.encode_image(images), unit(image))
    close(regions.embed, unit(region))
    corners = np.concatenate(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
    )
    close(regions.boxes_xyxy, corners.clip(0, 1))
    close(model.encode_text(ids.astype(np.int32)), unit(np.stack([reference.text(i) for i in ids])))


def test_names_in_both_directions():
    states = made_up()
    model = infer(states, dict(image=None, text=5, decoder=6)).model
    params = to_params(states["backbone"], states["decoder"], model)
    back = names.state_dicts(params, sizes_of(model))
    for module, state in states.items():
        used = state.keys() - set(names.UNUSED[module])
        assert back[module].keys() == used
        for name in used:
            np.testing.assert_array_equal(back[module][name], state[name])
            assert back[module][name].shape == state[name].shape


def test_heads_that_are_not_given(tmp_path, capsys):
    states = made_up()
    path = save(tmp_path / "x.pth.tar", states, prefix="")
    arguments = ["from-torch", "--input", path, "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert [line.split(": ")[1] for line in lines[:-1]] == ["--text-heads", "--decoder-heads"]
    assert lines[-1] == "2 faults; nothing was written"
    assert (
        main([*arguments, "--text-heads", "7", "--decoder-heads", "6", "--image-heads", "4"]) == 2
    )
    err = capsys.readouterr().err
    assert "--image-heads: got 4, but the qk-norm of size 12 means 3" in err
    assert "--text-heads: got 7, expected a divisor of the width 40" in err
    assert not (tmp_path / "out").exists()


def test_assumed_heads_are_the_references():
    faults = []
    assert [_heads(t, w, None, None, faults)[0] for t, w in (("image", 384), ("image", 768))] == [
        12,
        12,
    ]
    assert [
        _heads("image", 1024, None, None, faults)[0],
        _heads("text", 512, None, None, faults)[0],
    ] == [16, 8]
    assert _heads("text", 640, None, None, faults) == (
        10,
        "10 (width 640; ASSUMED, heads of size 64)",
    )
    assert not faults


def test_every_wrong_entry_is_a_line(tmp_path, capsys):
    states = made_up()
    backbone, decoder = states["backbone"], states["decoder"]
    del backbone["ln_final.bias"]
    del decoder["transformer.decoder.layers.1.self_attn.in_proj_weight"]
    backbone["visual.blocks.1.mlp.fc1.weight"] = np.zeros((107, 36), np.float32)
    decoder["bbox_embed.layers.1.bias"][3] = np.nan
    decoder["adapter.weight"] = np.zeros((2, 2), np.float32)
    path = save(tmp_path / "x.pth.tar", states)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *HEADS]) == 2
    assert capsys.readouterr().err.strip().split("\n") == [
        f"{path}: backbone visual.blocks.1.mlp.fc1.weight: got shape (107, 36), expected (108, 36)",
        f"{path}: backbone ln_final.bias: missing",
        f"{path}: decoder transformer.decoder.layers.1.self_attn.in_proj_weight: missing",
        f"{path}: decoder bbox_embed.layers.1.bias: holds values that are not finite",
        f"{path}: decoder adapter.weight: unknown key, shape (2, 2)",
        "5 faults; nothing was written",
    ]
    assert not (tmp_path / "out").exists()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "case",
    [
        *("hostile", "noise", "text", "cut", "list", "no_state_dicts", "missing", "not_tensors"),
        *("integers", "twice", "sizes"),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, case):
    path, marker = tmp_path / "x.pth.tar", tmp_path / "executed"
    said = "not a checkpoint of plain tensors"
    if case == "hostile":
        torch.save({"state_dict": Hostile(str(marker)), "backbone_state_dict": {}}, path)
        said = f"tensors (it asks for {os.name}.mkdir; what might run code is not loaded)"
    elif case == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif case == "text":
        path.write_text("hello\n")
    elif case == "cut":
        save(path, made_up())
        path.write_bytes(path.read_bytes()[:5000])
    elif case == "integers":
        torch.save({"state_dict": {"a": torch.zeros(2).int()}, "backbone_state_dict": {}}, path)
        said = "decoder a: got torch.int32, expected plain floats"
    elif case == "twice":
        names = {"a": torch.zeros(2), "module.a": torch.zeros(2)}
        torch.save({"state_dict": names, "backbone_state_dict": {}}, path)
        said = "decoder: a: is there with and without module."
    elif case == "list":
        torch.save([torch.zeros(2)], path)
        said = "got a list, expected a dict with backbone_state_dict and state_dict"
    elif case == "no_state_dicts":
        torch.save({"state_dict": {}, "epoch": 1}, path)
        said = "no state dict 'backbone_state_dict'; the file has state_dict, epoch"
    elif case == "missing":
        said = "no such file"
    elif case == "not_tensors":
        torch.save({"state_dict": {"proj.weight": 3}, "backbone_state_dict": {}}, path)
        said = "decoder proj.weight: got int, not a tensor"
    else:
        states = made_up()
        states["backbone"]["visual.pos_embed"] = np.zeros((1, 24, 36), np.float32)
        save(path, states)
        said = "visual.pos_embed: got 24 positions, expected a class token and a square"
    assert (
        main(["from-torch", "--input", str(path), "--output", str(tmp_path / "out"), *HEADS]) == 2
    )
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 2 and lines[0].startswith(f"{path}: ") and said in lines[0]
    assert lines[1] == "1 fault; nothing was written"
    assert "weights_only" not in lines[0]  # torch's advice is to load the file unchecked
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    path = save(tmp_path / "x.pth.tar", made_up())
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *HEADS]) == 2
    assert "is in use by something else" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["to-mars", "--input", "a"],
            "to-mars: no such kind; there are: from-torch, to-torch",
        ),
        (["from-torch", "--input", "a"], "--output PATH: missing"),
        (
            ["from-torch", "--input", "a", "--output", "b", "--text-heads", "x"],
            "--text-heads: got 'x', expected a whole number in 1..",
        ),
        ([], "expected a kind first: from-torch, to-torch"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1 and said in lines[0]
