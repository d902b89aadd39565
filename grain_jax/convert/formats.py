"""The tables of the towers in PyTorch's packages: OpenAI and open_clip, timm, transformers.

A table names modules; their parameters and layouts follow from our names (`rows`).
"""

from grain_jax.convert import tables
from grain_jax.convert.tables import NamePair

Names = dict[str, str]  # our part of a model -> its name elsewhere
_TOKENS = ("class_token", "registers", "position_embed")
# Parts that are one parameter.
_PARAMETERS = (
    *_TOKENS,
    *("probe", "embedding", "query_embed", "kernel", "bias", "layer_scale_1", "layer_scale_2"),
)


def _block(norms: str, attention: str, mlp: str, qk_norms: str = "") -> Names:
    """The parts of a layer; {} in `norms` is 1 or 2, and other names have a space between."""
    names = {"norm_1": norms.format(1), "attention": attention, "norm_2": norms.format(2)}
    qk_names = zip(("attention/query_norm", "attention/key_norm"), qk_norms.split())
    return names | dict(qk_names) | dict(zip(("mlp/in", "mlp/out"), mlp.split()))


_OPENAI = _block("ln_{}", "attn.in_proj_ attn.out_proj", "mlp.c_fc mlp.c_proj", "attn.ln_q attn.ln_k")
_TIMM = _block("norm{}", "attn.qkv attn.proj", "mlp.fc1 mlp.fc2", "attn.q_norm attn.k_norm")
_OURS = {"mlp/gate": "mlp.gate", "layer_scale_1": "ls1", "layer_scale_2": "ls2"}
_QKV = "{0}.q_proj {0}.k_proj {0}.v_proj "
_HF = _block("layer_norm{}", _QKV.format("self_attn") + "self_attn.out_proj", "mlp.fc1 mlp.fc2")
_DINOV3 = {
    **_block("norm{}", _QKV.format("attention") + "attention.o_proj", "mlp.up_proj mlp.down_proj"),
    "mlp/gate": "mlp.gate_proj",
    **{f"layer_scale_{i}": f"layer_scale{i}.lambda1" for i in (1, 2)},
}


def rows(ours: str, theirs: str, names: Names, tokens: tables.ArrayLayout = tables.SAME) -> list[NamePair]:
    """The table of a model, or of a part of one, in PyTorch.

    Args:
      ours, theirs: what all names begin with; "{}" in `theirs` is the layer.
      names: of modules and parameters. An attention has its entries for query, key and value (together or
        apart) and its output, with a space between.
      tokens: how class token, registers and positions are held.
    """
    out = []
    for part, name in names.items():
        last = part.rpartition("/")[2]
        if last.endswith("attention"):
            out += _attention(ours + part, [theirs + each for each in name.split()])
        elif last in _PARAMETERS:
            layout = tables.THREE_AXES if last == "probe" else tokens if last in _TOKENS else tables.SAME
            out.append(NamePair(ours + part, theirs + name, layout))
        else:
            kernel, layout = "kernel", tables.PATCHES if last == "patch_embed" else tables.LINEAR
            if "norm" in last:
                kernel, layout = "scale", tables.SAME
            out.append(NamePair(f"{ours}{part}/{kernel}", f"{theirs}{name}.weight", layout))
            out.append(NamePair(f"{ours}{part}/bias", f"{theirs}{name}.bias"))
    return out


def _attention(ours: str, theirs: list[str]) -> list[NamePair]:
    *qkv, projection = theirs
    counts = {1: (3,), 2: (1, 2), 3: (1, 1, 1)}[len(qkv)]  # how many of the three an entry holds
    parts = [(entry, (i, count)) for entry, count in zip(qkv, counts) for i in range(count)]
    out = []
    for name, (entry, part) in zip(("query", "key", "value"), parts):
        prefix = entry if entry.endswith("_") else f"{entry}."
        out.append(NamePair(f"{ours}/{name}/kernel", f"{prefix}weight", tables.HEADS_IN, part))
        out.append(NamePair(f"{ours}/{name}/bias", f"{prefix}bias", tables.HEADS_BIAS, part))
    out.append(NamePair(f"{ours}/out/kernel", f"{projection}.weight", tables.HEADS_OUT))
    out.append(NamePair(f"{ours}/out/bias", f"{projection}.bias"))
    return out


def pool(attention: str, **names: str) -> Names:
    """The parts of a pooling head; `names` of other parts than the attention may differ."""
    mlp = {"mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2"}
    return {"probe": "probe", "attention": attention, "norm": "norm", **mlp, **names}


def openai_image() -> list[NamePair]:
    """The image tower of OpenAI and open_clip."""
    names = {
        "image/patch_embed": "conv1",
        "image/class_token": "class_embedding",
        "image/position_embed": "positional_embedding",
        "image/pre_norm": "ln_pre",
        "image/norm": "ln_post",
        "image_projection/kernel": "proj",
    }
    layers = rows("image/blocks/", "visual.transformer.resblocks.{}.", _OPENAI)
    return rows("", "visual.", names) + layers


def openai_text(prefix: str = "", matrix: bool = True) -> list[NamePair]:
    """The text tower of OpenAI, open_clip and the reference; `matrix`: its projection is no linear layer."""
    names = {
        "text/token_embed/embedding": "token_embedding.weight",
        "text/position_embed": "positional_embedding",
        "text_norm": "ln_final",
        "text_projection/kernel" if matrix else "text_projection": "text_projection",
    }
    layers = rows("text/blocks/", prefix + "transformer.resblocks.{}.", _OPENAI)
    return rows("", prefix, names) + layers


def _timm_image(prefix: str, layer: Names) -> list[NamePair]:
    names = {
        "patch_embed": "patch_embed.proj",
        "class_token": "cls_token",
        "registers": "reg_token",
        "position_embed": "pos_embed",
        "pre_norm": "norm_pre",
        "norm": "norm",
    }
    layers = rows("image/blocks/", prefix + "blocks.{}.", layer)
    return rows("image/", prefix, names, tables.THREE_AXES) + layers


def own_image(prefix: str) -> list[NamePair]:
    """Our vision transformer with all of its options, by timm's names: the modeling file's."""
    return _timm_image(prefix, _TIMM | _OURS)


def timm_image_in_open_clip(projection: str = "head.proj") -> list[NamePair]:
    """The image tower of open_clip around a transformer of timm; `projection` may be "trunk.head"."""
    return [
        *_timm_image("visual.trunk.", _TIMM),
        *rows("image_pool/", "visual.trunk.attn_pool.", pool("q kv proj", probe="latent")),
        *rows("", "visual.", {"image_projection": projection}),
    ]


def hf_dinov3(layers: str = "") -> list[NamePair]:
    """DINOv3 in transformers; `layers`: what the names of its layers begin with in memory, not in files."""
    names = {
        "patch_embed": "embeddings.patch_embeddings",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "norm": "norm",
    }
    table = rows("image/", "", names, tables.THREE_AXES)
    return table + rows("image/blocks/", layers + "layer.{}.", _DINOV3)


def hf_tips(gated: bool) -> list[NamePair]:
    """TIPS v2 in transformers, and its constant positions of texts by CLIP's name."""
    names = {
        "patch_embed": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "position_embed": "embeddings.position_embeddings",
        "norm": "layernorm",
    }
    layer = _DINOV3 | ({} if gated else {"mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2"})
    table = rows("image/", "vision_model.", names, tables.THREE_AXES)
    return table + rows("image/blocks/", "vision_model.encoder.layer.{}.", layer) + hf_text("")


def hf_image() -> list[NamePair]:
    """The image tower of CLIP and SigLIP in transformers."""
    names = {
        "patch_embed": "embeddings.patch_embedding",
        "class_token": "embeddings.class_embedding",
        "position_embed": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",
        "norm": "post_layernorm",
    }
    head = pool("attention.in_proj_ attention.out_proj", norm="layernorm")
    return [
        *rows("image/", "vision_model.", names),
        *rows("image/blocks/", "vision_model.encoder.layers.{}.", _HF),
        *rows("image_pool/", "vision_model.head.", head),
        *rows("", "", {"image_projection": "visual_projection"}),
    ]


def hf_text(projection: str) -> list[NamePair]:
    """The text tower of CLIP ("text_projection") and SigLIP ("text_model.head") in transformers."""
    names = {
        "text/token_embed/embedding": "embeddings.token_embedding.weight",
        "text/position_embed": "embeddings.position_embedding.weight",
        "text_norm": "final_layer_norm",
    }
    return [
        *rows("", "text_model.", names),
        *rows("text/blocks/", "text_model.encoder.layers.{}.", _HF),
        *rows("", "", {"text_projection": projection}),
    ]
