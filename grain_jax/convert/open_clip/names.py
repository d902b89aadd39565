"""Names of the parameters in the layers of CLIP and SigLIP checkpoints, as rows of `towers.arrange`."""

from typing import NamedTuple

from grain_jax.convert import layouts
from grain_jax.convert.towers import Row


class LayerNames(NamedTuple):
    """Names inside a layer; {kind} is weight or bias."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]  # one entry for query, key and value, or three
    out: str
    mlp: tuple[str, str]


NATIVE = LayerNames(  # OpenAI, open_clip
    ("ln_1", "ln_2"), ("attn.in_proj_{kind}",), "attn.out_proj", ("mlp.c_fc", "mlp.c_proj")
)
TIMM = LayerNames(("norm1", "norm2"), ("attn.qkv.{kind}",), "attn.proj", ("mlp.fc1", "mlp.fc2"))
HF = LayerNames(
    ("layer_norm1", "layer_norm2"),
    ("self_attn.q_proj.{kind}", "self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}"),
    "self_attn.out_proj",
    ("mlp.fc1", "mlp.fc2"),
)
# Number of entries for query, key and value -> for each of these (entry, part, parts of the entry).
_QKV = {
    1: ((0, 0, 3), (0, 1, 3), (0, 2, 3)),
    2: ((0, 0, 1), (1, 0, 2), (1, 1, 2)),
    3: ((0, 0, 1), (1, 0, 1), (2, 0, 1)),
}


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    """The rows of a linear layer."""
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", layouts.LINEAR)]
    return rows + [Row(f"{ours}/bias", f"{theirs}.bias")] * bias


def norm(ours: str, theirs: str) -> list[Row]:
    """The rows of a LayerNorm."""
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def _attention(ours: str, qkv: tuple[str, ...], out: str) -> list[Row]:
    rows = [
        Row(
            f"{ours}/{name}/{leaf}",
            qkv[entry].replace("{kind}", kind),
            layouts.HEADS_IN,
            (part, parts),
        )
        for name, (entry, part, parts) in zip(("query", "key", "value"), _QKV[len(qkv)])
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
    ]
    return [
        *rows,
        Row(f"{ours}/out/kernel", f"{out}.weight", layouts.HEADS_OUT),
        Row(f"{ours}/out/bias", f"{out}.bias"),
    ]


def blocks(tower: str, prefix: str, parts: LayerNames) -> list[Row]:
    """The rows of all layers of a transformer, whose entries start with `prefix`."""
    ours, layer = f"{tower}/blocks", prefix + "{}."
    return [
        *norm(f"{ours}/norm_1", layer + parts.norms[0]),
        *_attention(f"{ours}/attention", tuple(layer + x for x in parts.qkv), layer + parts.out),
        *norm(f"{ours}/norm_2", layer + parts.norms[1]),
        *linear(f"{ours}/mlp/in", layer + parts.mlp[0]),
        *linear(f"{ours}/mlp/out", layer + parts.mlp[1]),
    ]


def attention_pool(
    theirs: str, probe: str, qkv: tuple[str, ...], out: str, norm_name: str
) -> list[Row]:
    """The rows of an attention pooling head, whose entries start with `theirs`."""
    return [
        Row("image_pool/probe", theirs + probe, layouts.TOKEN),
        *_attention("image_pool/attention", tuple(theirs + x for x in qkv), theirs + out),
        *norm("image_pool/norm", theirs + norm_name),
        *linear("image_pool/mlp/in", theirs + "mlp.fc1"),
        *linear("image_pool/mlp/out", theirs + "mlp.fc2"),
    ]
