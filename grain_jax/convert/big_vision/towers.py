"""The image and the text tower of a big_vision checkpoint: their tables, and what its models state."""

from typing import Any

from grain_jax.convert import tables, towers
from grain_jax.convert.big_vision.checkpoint import Checkpoint
from grain_jax.convert.faults import prefixed
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.convert.towers import Settings, Stated, Tower


def import_tower(which: str, checkpoint: Checkpoint, settings: Settings) -> Tower:
    """The "image" or "text" tower of a checkpoint, which may be all of it.

    Raises:
      ConvertError: there is none, or an entry that gives a size is missing or does not fit.
    """
    is_image = which == "image"
    prefix, rows = ("img/", image_rows()) if is_image else ("txt/", text_rows())
    if not any(name.startswith(prefix) for name in checkpoint.state):  # the tower alone
        prefix = ""
    rows = [row._replace(theirs=prefix + row.theirs) for row in rows]
    there = Entries(checkpoint.state, rows)
    assumed = ["norm epsilon 1e-6 and tanh GELU, its models'"]
    with prefixed(f"{checkpoint.path}: "):
        if is_image:
            pool = "class" if "image/class_token" in there else "mean"
            mean, std = towers.SIGLIP_PIXELS  # its value_range(-1, 1)
            fields: dict[str, Any] = dict(pixel_mean=mean, pixel_std=std)
            assumed[0] += "; pixels in [-1, 1]"
            if pool == "mean" and "image_pool/probe" not in there:
                assumed.append("pool mean, as its pool_type=gap")
        else:
            pool = "last"
            pad_id = 1 if there.shape("text/token_embed/embedding", 2)[0] == 32000 else 0
            fields = dict(causal=False, cleaning="canonical", pad_id=pad_id)
            fields |= dict(tokenizer="siglip.model")
            habit = "" if "text_pool/probe" in there else "; pool last, its default"
            assumed.append(f"texts padded with the id {pad_id}{habit}")
        heads = there.shape(f"{which}/blocks/attention/query/kernel", 3)[1]
        stated = Stated(1e-6, "gelu_tanh", "gelu_tanh", heads, pool, fields)
        return towers.settle(which, checkpoint.state, rows, prefix, stated, settings, assumed)


def image_rows() -> list[NamePair]:
    """The table of an image tower alone; in a two_towers checkpoint its entries begin with img/."""
    return [
        NamePair("image/patch_embed/kernel", "embedding/kernel", tables.PATCHES_LAST),
        NamePair("image/patch_embed/bias", "embedding/bias"),
        NamePair("image/class_token", "cls", tables.TOKEN),
        NamePair("image/position_embed", "pos_embedding", tables.BATCHED),
        *_encoder("image/blocks", "Transformer", "image/norm"),
        *_head("image"),
    ]


def text_rows() -> list[NamePair]:
    """The table of a text tower alone; in a two_towers checkpoint its entries begin with txt/."""
    return [
        NamePair("text/token_embed/embedding", "Embed_0/embedding"),
        NamePair("text/position_embed", "pos_embedding", tables.BATCHED),
        *_encoder("text/blocks", "Encoder_0", "text_norm"),
        *_head("text"),
    ]


def _same(ours: str, theirs: str, *leaves: str) -> list[NamePair]:
    return [NamePair(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in leaves]


def _attention_and_mlp(ours: str, theirs: str) -> list[NamePair]:
    attention = ("query", "key", "value", "out")
    parts = {f"attention/{x}": f"MultiHeadDotProductAttention_0/{x}" for x in attention}
    parts |= {"mlp/in": "MlpBlock_0/Dense_0", "mlp/out": "MlpBlock_0/Dense_1"}
    return [
        row
        for mine, of_them in parts.items()
        for row in _same(f"{ours}/{mine}", theirs + of_them, "kernel", "bias")
    ]


def _encoder(ours: str, theirs: str, norm: str) -> list[NamePair]:
    layer = theirs + "/encoderblock_{}/"
    return [
        *_same(f"{ours}/norm_1", f"{layer}LayerNorm_0", "scale", "bias"),
        *_same(f"{ours}/norm_2", f"{layer}LayerNorm_1", "scale", "bias"),
        *_attention_and_mlp(ours, layer),
        *_same(norm, f"{theirs}/encoder_norm", "scale", "bias"),
    ]


def _head(tower: str) -> list[NamePair]:
    return [
        NamePair(f"{tower}_pool/probe", "MAPHead_0/probe", tables.TOKEN),
        *_same(f"{tower}_pool/norm", "MAPHead_0/LayerNorm_0", "scale", "bias"),
        *_attention_and_mlp(f"{tower}_pool", "MAPHead_0/"),
        *_same(f"{tower}_projection", "head", "kernel", "bias"),
    ]
