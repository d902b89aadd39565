"""The tables of the towers in PyTorch's packages: OpenAI and open_clip, timm, transformers."""

from typing import NamedTuple

from grain_jax.convert import tables
from grain_jax.convert.tables import NamePair


class LayerNames(NamedTuple):
    """Names inside a layer; {kind} is weight or bias."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]  # one entry for query, key and value, or three
    out: str
    mlp: tuple[str, str]
    qk_norms: tuple[str, ...] = ()
    gate: str = ""  # of a gated MLP
    scales: tuple[str, ...] = ()  # of layer scale


_OPENAI = LayerNames(
    ("ln_1", "ln_2"),
    ("attn.in_proj_{kind}",),
    "attn.out_proj",
    ("mlp.c_fc", "mlp.c_proj"),
    ("attn.ln_q", "attn.ln_k"),
)
_TIMM = LayerNames(
    ("norm1", "norm2"),
    ("attn.qkv.{kind}",),
    "attn.proj",
    ("mlp.fc1", "mlp.fc2"),
    ("attn.q_norm", "attn.k_norm"),
)
_OURS = _TIMM._replace(gate="mlp.gate", scales=("ls1.gamma", "ls2.gamma"))  # of our modeling file
_HF = LayerNames(
    ("layer_norm1", "layer_norm2"),
    ("self_attn.q_proj.{kind}", "self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}"),
    "self_attn.out_proj",
    ("mlp.fc1", "mlp.fc2"),
)
_DINOV3 = LayerNames(
    ("norm1", "norm2"),
    ("attention.q_proj.{kind}", "attention.k_proj.{kind}", "attention.v_proj.{kind}"),
    "attention.o_proj",
    ("mlp.up_proj", "mlp.down_proj"),
    gate="mlp.gate_proj",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
# Number of entries for query, key and value -> for each of these (entry, (part, parts of the entry)).
_QKV = {
    1: ((0, (0, 3)), (0, (1, 3)), (0, (2, 3))),
    2: ((0, (0, 1)), (1, (0, 2)), (1, (1, 2))),
    3: ((0, (0, 1)), (1, (0, 1)), (2, (0, 1))),
}


def linear(ours: str, theirs: str, layout: tables.ArrayLayout = tables.LINEAR) -> list[NamePair]:
    """The rows of a linear layer or, with PATCHES, of a convolution."""
    return [
        NamePair(f"{ours}/kernel", f"{theirs}.weight", layout),
        NamePair(f"{ours}/bias", f"{theirs}.bias"),
    ]


def norm(ours: str, theirs: str) -> list[NamePair]:
    """The rows of a LayerNorm."""
    return [
        NamePair(f"{ours}/scale", f"{theirs}.weight"),
        NamePair(f"{ours}/bias", f"{theirs}.bias"),
    ]


def attention(ours: str, qkv: tuple[str, ...], out: str) -> list[NamePair]:
    """The rows of an attention; the entries `qkv` hold query, key and value together or apart."""
    return [
        *(
            NamePair(f"{ours}/{name}/{leaf}", qkv[entry].replace("{kind}", kind), layout, part)
            for name, (entry, part) in zip(("query", "key", "value"), _QKV[len(qkv)])
            for leaf, kind, layout in (
                ("kernel", "weight", tables.HEADS_IN),
                ("bias", "bias", tables.HEADS_BIAS),
            )
        ),
        NamePair(f"{ours}/out/kernel", f"{out}.weight", tables.HEADS_OUT),
        NamePair(f"{ours}/out/bias", f"{out}.bias"),
    ]


def _blocks(ours: str, layer: str, parts: LayerNames) -> list[NamePair]:
    return [
        *norm(f"{ours}/norm_1", layer + parts.norms[0]),
        *attention(f"{ours}/attention", tuple(layer + x for x in parts.qkv), layer + parts.out),
        *(
            row
            for name, theirs in zip(("query_norm", "key_norm"), parts.qk_norms)
            for row in norm(f"{ours}/attention/{name}", layer + theirs)
        ),
        *norm(f"{ours}/norm_2", layer + parts.norms[1]),
        *linear(f"{ours}/mlp/in", layer + parts.mlp[0]),
        *(linear(f"{ours}/mlp/gate", layer + parts.gate) if parts.gate else ()),
        *linear(f"{ours}/mlp/out", layer + parts.mlp[1]),
        *(
            NamePair(f"{ours}/layer_scale_{i}", layer + theirs)
            for i, theirs in enumerate(parts.scales, 1)
        ),
    ]


def pool(
    theirs: str,
    probe: str,
    qkv: tuple[str, ...],
    out: str,
    norm_name: str,
    ours: str = "image_pool",
) -> list[NamePair]:
    """The rows of a pooling head; `ours` is "image_pool" or "text_pool"."""
    return [
        NamePair(f"{ours}/probe", theirs + probe, tables.TOKEN),
        *attention(f"{ours}/attention", tuple(theirs + x for x in qkv), theirs + out),
        *norm(f"{ours}/norm", theirs + norm_name),
        *linear(f"{ours}/mlp/in", theirs + "mlp.fc1"),
        *linear(f"{ours}/mlp/out", theirs + "mlp.fc2"),
    ]


def openai_image() -> list[NamePair]:
    """The image tower of OpenAI and open_clip."""
    return [
        *linear("image/patch_embed", "visual.conv1", tables.PATCHES),
        NamePair("image/class_token", "visual.class_embedding"),
        NamePair("image/position_embed", "visual.positional_embedding"),
        *norm("image/pre_norm", "visual.ln_pre"),
        *_blocks("image/blocks", "visual.transformer.resblocks.{}.", _OPENAI),
        *norm("image/norm", "visual.ln_post"),
        NamePair("image_projection/kernel", "visual.proj"),
    ]


def openai_text(prefix: str = "", matrix: bool = True) -> list[NamePair]:
    """The text tower of OpenAI, open_clip and the PyTorch reference; `matrix`: its projection is no linear layer."""
    projection = f"{prefix}text_projection"
    return [
        NamePair("text/token_embed/embedding", f"{prefix}token_embedding.weight"),
        NamePair("text/position_embed", f"{prefix}positional_embedding"),
        *_blocks("text/blocks", prefix + "transformer.resblocks.{}.", _OPENAI),
        *norm("text_norm", f"{prefix}ln_final"),
        *(
            [NamePair("text_projection/kernel", projection)]
            if matrix
            else linear("text_projection", projection)
        ),
    ]


def timm_image(prefix: str, parts: LayerNames = _TIMM) -> list[NamePair]:
    """The vision transformer of timm, alone: without a pooling head or a projection."""
    return [
        *linear("image/patch_embed", f"{prefix}patch_embed.proj", tables.PATCHES),
        NamePair("image/class_token", f"{prefix}cls_token", tables.TOKEN),
        NamePair("image/position_embed", f"{prefix}pos_embed", tables.BATCHED),
        *norm("image/pre_norm", f"{prefix}norm_pre"),
        *_blocks("image/blocks", prefix + "blocks.{}.", parts),
        *norm("image/norm", f"{prefix}norm"),
    ]


def own_image(prefix: str, *, key_bias: bool) -> list[NamePair]:
    """Our vision transformer with all of its options, by timm's names: the modeling file's.

    Without key biases, the biases of queries and values have separate entries.
    """
    rows, layer = timm_image(prefix, _OURS), prefix + "blocks.{}."
    if not key_bias:
        rows = [row for row in rows if row.theirs != f"{layer}attn.qkv.bias"]
        rows += [
            NamePair(
                f"image/blocks/attention/{name}/bias",
                f"{layer}attn.{name[0]}_bias",
                tables.HEADS_BIAS,
            )
            for name in ("query", "value")
        ]
    return [*rows, NamePair("image/registers", f"{prefix}reg_token", tables.BATCHED)]


def timm_image_in_open_clip() -> list[NamePair]:
    """The image tower of open_clip around a transformer of timm."""
    qkv = ("q.{kind}", "kv.{kind}")
    return [
        *timm_image("visual.trunk."),
        *pool("visual.trunk.attn_pool.", "latent", qkv, "proj", "norm"),
        *linear("image_projection", "visual.head.proj"),
    ]


def hf_dinov3(layers: str = "") -> list[NamePair]:
    """DINOv3 in transformers; `layers`: the first part of the names of its layers in memory, which files leave out."""
    embeddings = "embeddings."
    return [
        *linear("image/patch_embed", embeddings + "patch_embeddings", tables.PATCHES),
        NamePair("image/class_token", embeddings + "cls_token", tables.TOKEN),
        NamePair("image/registers", embeddings + "register_tokens", tables.BATCHED),
        *_blocks("image/blocks", layers + "layer.{}.", _DINOV3),
        *norm("image/norm", "norm"),
    ]


def hf_image() -> list[NamePair]:
    """The image tower of CLIP and SigLIP in transformers."""
    embeddings, head = "vision_model.embeddings.", "vision_model.head."
    qkv = ("attention.in_proj_{kind}",)
    return [
        *linear("image/patch_embed", embeddings + "patch_embedding", tables.PATCHES),
        NamePair("image/class_token", embeddings + "class_embedding"),
        NamePair("image/position_embed", embeddings + "position_embedding.weight"),
        *norm("image/pre_norm", "vision_model.pre_layrnorm"),
        *_blocks("image/blocks", "vision_model.encoder.layers.{}.", _HF),
        *norm("image/norm", "vision_model.post_layernorm"),
        *pool(head, "probe", qkv, "attention.out_proj", "layernorm"),
        *linear("image_projection", "visual_projection"),
    ]


def hf_text(projection: str) -> list[NamePair]:
    """The text tower of CLIP ("text_projection") and SigLIP ("text_model.head") in transformers."""
    embeddings = "text_model.embeddings."
    return [
        NamePair("text/token_embed/embedding", embeddings + "token_embedding.weight"),
        NamePair("text/position_embed", embeddings + "position_embedding.weight"),
        *_blocks("text/blocks", "text_model.encoder.layers.{}.", _HF),
        *norm("text_norm", "text_model.final_layer_norm"),
        *linear("text_projection", projection),
    ]
