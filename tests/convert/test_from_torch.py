import math
import os

import numpy as np
import pytest
import torch

import grain_jax
from grain_jax.convert import parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.reference import names
from tests import foreign, perturbed

# Not the goldens' sizes, and no two alike.
IMAGE, PATCH, EMBED = 40, 8, 28
HEADS = {"image": 3, "text": 5, "decoder": 6}
FLAGS = ["--image-heads", "3", "--text-heads", "5", "--decoder-heads", "6"]


def made_up():
    """State dicts of random values; what the names mean is `Reference`'s, which does not know our table."""
    model = perturbed.tiny(
        **dict(image__width=36, image__heads=3, image__depth=3, image__mlp_dim=108),
        **dict(text__width=40, text__heads=5, text__depth=1, text__mlp_dim=120),
        **dict(decoder__width=48, decoder__heads=6, decoder__mlp_dim=144),
        image__qk_norm=True,
    )
    return names.to_states(model, perturbed.params(model))


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
        p, heads = self.use("backbone"), HEADS["image"]
        kernel = p["visual.patch_embed.proj.weight"]
        grid = range(0, IMAGE, PATCH)
        tokens = [p["visual.cls_token"][0, 0]] + [
            (kernel * image[:, y : y + PATCH, x : x + PATCH]).sum((1, 2, 3))
            + p["visual.patch_embed.proj.bias"]
            for y in grid
            for x in grid
        ]
        x = np.stack(tokens) + p["visual.pos_embed"][0]
        for i in range(3):
            name = f"visual.blocks.{i}"
            y = self.linear(self.norm(x, f"{name}.norm1", 1e-6), f"{name}.attn.qkv")
            q, k, v = (self.heads(part, heads) for part in np.split(y, 3, axis=-1))
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
        for i in range(1):
            name = f"transformer.resblocks.{i}"
            y = self.norm(x, f"{name}.ln_1", 1e-5)
            x = x + self.attention(y, y, y, f"{name}.attn", HEADS["text"], causal=True)
            y = self.linear(self.norm(x, f"{name}.ln_2", 1e-5), f"{name}.mlp.c_fc")
            x = x + self.linear(y / (1 + np.exp(-1.702 * y)), f"{name}.mlp.c_proj")
        return self.norm(x, "ln_final", 1e-5)[ids.argmax()] @ p["text_projection"]

    def regions(self, tokens):
        """[N, E] -> image embedding [D], region embeddings [Q, D], boxes cxcywh [Q, 4]."""
        p, heads = self.use("decoder"), HEADS["decoder"]
        memory = self.norm(tokens @ p["proj.weight"].T, "transformer.pre_norm", 1e-5)
        place = p["query_embed.weight"]
        x = np.zeros_like(place)
        for i in range(2):
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


def test_another_size_gives_the_outputs_of_an_independent_forward(tmp_path, capsys):
    states = made_up()
    path = save(tmp_path / "x.pth.tar", states)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *FLAGS]) == 0
    report = capsys.readouterr().out
    assert "parity: PROVEN" in report and "ASSUMED" not in report
    for unused in ("backbone image_projection (36, 28)", "decoder class_embed.bias (22048,)"):
        assert unused in report
    total = sum(a.size for s in states.values() for a in s.values())
    assert f"values: {total:,} in the file" in report

    model = grain_jax.load(str(tmp_path / "out"))
    assert model.model.image.image_size == IMAGE and model.model.image.qk_norm
    assert (model.model.text.vocab_size, model.model.text.context_length) == (300, 32)
    assert model.model.decoder.queries == 3 and model.model.embed_dim == EMBED

    images, ids = parity.inputs(IMAGE, 300, 32, seed=1)
    reference = Reference(states)
    expected = [
        reference.regions(reference.image_tokens(p.transpose(2, 0, 1).astype(np.float64)))
        for p in images
    ]
    image, region, boxes = (np.stack(x) for x in zip(*expected))
    regions = model.encode_regions(images)
    foreign.close(model.encode_image(images), unit(image))
    foreign.close(regions.embed, unit(region))
    corners = np.concatenate(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
    )
    foreign.close(regions.boxes_xyxy, corners.clip(0, 1))
    foreign.close(model.encode_text(ids), unit(np.stack([reference.text(i) for i in ids])))


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
    assert "image heads: got 4, but the checkpoint says 3" in err
    assert "text heads: got 7, expected a divisor of the width 40" in err
    assert not (tmp_path / "out").exists()


def test_every_wrong_entry_is_a_line(tmp_path, capsys):
    states = made_up()
    backbone, decoder = states["backbone"], states["decoder"]
    del backbone["ln_final.bias"]
    del decoder["transformer.decoder.layers.1.self_attn.in_proj_weight"]
    backbone["visual.blocks.1.mlp.fc1.weight"] = np.zeros((107, 36), np.float32)
    decoder["bbox_embed.layers.1.bias"][3] = np.nan
    decoder["adapter.weight"] = np.zeros((2, 2), np.float32)
    path = save(tmp_path / "x.pth.tar", states)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *FLAGS]) == 2
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


def _stored(decoder, **backbone):
    return {"state_dict": decoder, "backbone_state_dict": backbone}


ZEROS = torch.zeros(2)
BAD = {  # what is in the file, which makes folders at `marker` if it is run; the line
    "hostile": (
        lambda marker: _stored(Hostile(marker)),
        f"tensors (it asks for {os.name}.mkdir; what might run code is not loaded)",
    ),
    "cut": (lambda _: None, "not a checkpoint of plain tensors"),
    "integers": (lambda _: _stored({"a": ZEROS.int()}), "decoder a: got torch.int32, expected plain floats"),
    "twice": (lambda _: _stored({"a": ZEROS, "module.a": ZEROS}), "decoder a: is there with and without module."),
    "no_state_dicts": (
        lambda _: {"state_dict": {}, "epoch": 1},
        "no state dict 'backbone_state_dict'; the file has state_dict, epoch",
    ),
    "missing": (None, "no such file"),
    "not_tensors": (lambda _: _stored({"proj.weight": 3}), "decoder proj.weight: got int, not a tensor"),
    "sizes": (lambda _: {}, "visual.pos_embed: got 24 positions, expected a square"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(tmp_path, capsys, case):
    (build, said), path, marker = BAD[case], tmp_path / "x.pth.tar", tmp_path / "executed"
    stored = build(str(marker)) if build else None
    if case == "sizes":
        states = made_up()
        states["backbone"]["visual.pos_embed"] = np.zeros((1, 24, 36), np.float32)
        save(path, states)
    elif case == "cut":
        save(path, made_up())
        path.write_bytes(path.read_bytes()[:5000])
    elif isinstance(stored, bytes):
        path.write_bytes(stored)
    elif build:
        torch.save(stored, path)
    out = tmp_path / "out"
    assert main(["from-torch", "--input", str(path), "--output", str(out), *FLAGS]) == 2
    first, last = capsys.readouterr().err.strip().split("\n")
    assert first.startswith(f"{path}: ") and said in first
    assert last == "1 fault; nothing was written"
    assert "weights_only" not in first  # torch's advice is to load the file unchecked
    assert not marker.exists() and not out.exists()
