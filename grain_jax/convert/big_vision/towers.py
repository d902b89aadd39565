"""The image and the text tower of a big_vision checkpoint.

Older names and layouts that its loaders repair (models/vit.py, models/proj/image_text/text_transformer.py at
0127fb6) are read too.
"""

import re
from typing import Any

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import layouts, towers
from grain_jax.convert.big_vision.checkpoint import Checkpoint, below
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.towers import Config, Row, Settings, Tower

_ACTIVATION = "gelu_tanh"
Tree = dict[str, np.ndarray]
PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and standard deviation of its value_range(-1, 1)
_PROBE = layouts.Layout(lambda a, s: a.reshape(-1), lambda a, s: a[None, None])
_PATCHES = layouts.Layout(  # [p, p, 3, E] <-> [p * p * 3, E]
    lambda a, s: a.reshape(-1, a.shape[-1]), lambda a, s: a.reshape(s["p"], s["p"], 3, -1)
)


def import_image(checkpoint: Checkpoint, settings: Settings) -> Tower[config_lib.ImageTower]:
    """The image tower of a checkpoint, which may be all of it.

    Raises:
      ConvertError: there is none, or an entry is missing or does not fit.
    """
    prefix, tree = _subtree(checkpoint, "img/")
    with prefixed(f"{checkpoint.path}: {prefix}"):
        return _with_prefix(_image(tree, settings), prefix)


def import_text(checkpoint: Checkpoint, settings: Settings) -> Tower[config_lib.TextTower]:
    """The text tower of a checkpoint, which may be all of it.

    Raises:
      ConvertError: there is none, or an entry is missing or does not fit.
    """
    prefix, tree = _subtree(checkpoint, "txt/")
    with prefixed(f"{checkpoint.path}: {prefix}"):
        return _with_prefix(_text(tree, settings), prefix)


def _subtree(checkpoint: Checkpoint, prefix: str) -> tuple[str, dict[str, np.ndarray]]:
    """The prefix of a tower's entries and its arrays without it; "" and all arrays of a lone tower."""
    inside = below(checkpoint.tree, prefix)
    return (prefix, inside) if inside else ("", dict(checkpoint.tree))


def _with_prefix(tower: Tower[Config], prefix: str) -> Tower[Config]:
    theirs = {ours: prefix + name for ours, name in tower.theirs.items()}
    return tower._replace(theirs=theirs, prefix=prefix)


def _encoder(tower: str, theirs: str) -> list[Row]:
    block = f"{theirs}/encoderblock"
    return [
        *_norm(f"{tower}/blocks/norm_1", f"{block}/LayerNorm_0"),
        *_attention(f"{tower}/blocks/attention", f"{block}/MultiHeadDotProductAttention_0"),
        *_norm(f"{tower}/blocks/norm_2", f"{block}/LayerNorm_1"),
        *_mlp(f"{tower}/blocks/mlp", f"{block}/MlpBlock_0"),
        *_norm("image/norm" if tower == "image" else "text_norm", f"{theirs}/encoder_norm"),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("scale", "bias")]


def _dense(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("kernel", "bias")]


def _attention(ours: str, theirs: str) -> list[Row]:
    return [
        row
        for part in ("query", "key", "value", "out")
        for row in _dense(f"{ours}/{part}", f"{theirs}/{part}")
    ]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return [*_dense(f"{ours}/in", f"{theirs}/Dense_0"), *_dense(f"{ours}/out", f"{theirs}/Dense_1")]


def _pool(ours: str) -> list[Row]:
    return [
        Row(f"{ours}/probe", "MAPHead_0/probe", _PROBE),
        *_attention(f"{ours}/attention", "MAPHead_0/MultiHeadDotProductAttention_0"),
        *_norm(f"{ours}/norm", "MAPHead_0/LayerNorm_0"),
        *_mlp(f"{ours}/mlp", "MAPHead_0/MlpBlock_0"),
    ]


def _shape(tree: Tree, name: str, axes: int) -> tuple[int, ...]:
    if name not in tree:
        raise ConvertError(f"{name}: missing")
    if tree[name].ndim != axes or 0 in tree[name].shape:
        raise ConvertError(f"{name}: got shape {tree[name].shape}, expected {axes} axes")
    return tree[name].shape


def _sizes(tree: Tree, encoder: str) -> dict[str, Any]:
    """The sizes that both towers take from the arrays of their encoder."""
    block = f"{encoder}/encoderblock"
    depth, width, heads, _ = _shape(tree, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    mlp_dim = _shape(tree, f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2]
    return dict(depth=depth, width=width, heads=heads, mlp_dim=mlp_dim)


def _activation(which: str, settings: Settings) -> str:
    """GELU with tanh. Raises ConvertError where the flag says otherwise."""
    return (
        towers.settled(f"{which} activation", settings.activation.get(which), _ACTIVATION)
        or _ACTIVATION
    )


def _renamed(tree: Tree) -> tuple[Tree, dict[str, str]]:
    """The arrays under the names of current files, and current name -> name in the file.

    Older files have other names for the positions and the pooling head.
    """
    moved = {
        "Transformer/posembed_input/pos_embedding": "pos_embedding",
        "Transformer/pos_embedding": "pos_embedding",
    }
    head = re.compile("(probe|MlpBlock_0|MultiHeadDotProductAttention_0|LayerNorm_0)(/|$)")
    name_of = {
        moved.get(name, f"MAPHead_0/{name}" if head.match(name) else name): name for name in tree
    }
    return {new: tree[old] for new, old in name_of.items()}, name_of


def _image(tree: Tree, settings: Settings) -> Tower[config_lib.ImageTower]:
    tree, original = _renamed(tree)
    patch = _shape(tree, "embedding/kernel", 4)[0]
    count = _shape(tree, "pos_embedding", 3)[1]
    token, pooled, head = "cls" in tree, "MAPHead_0/probe" in tree, "head/kernel" in tree
    grid = towers.side_of_grid("pos_embedding", count, token)
    assumed = ["norm epsilon 1e-6 and tanh GELU, its models'; pixels in [-1, 1]"]
    if not pooled and not token:
        assumed.append("pool mean, as its pool_type=gap")
    mean, std = PIXELS
    config = config_lib.ImageTower(
        **_sizes(tree, "Transformer"),
        image_size=grid * patch,
        patch_size=patch,
        qk_norm=False,
        norm_eps=1e-6,
        position_init="normal",
        position_period=1e4,
        block_init="trunc_normal",
        unroll=1,
        class_token=token,
        patch_bias="embedding/bias" in tree,
        activation=_activation("image", settings),
        pool="map" if pooled else "class" if token else "mean",
        projection="affine" if head else "none",
        pixel_mean=mean,
        pixel_std=std,
    )
    rows = [
        Row("image/patch_embed/kernel", "embedding/kernel", _PATCHES),
        *([Row("image/patch_embed/bias", "embedding/bias")] if config.patch_bias else []),
        *([Row("image/class_token", "cls", layouts.TOKEN)] if token else []),
        Row("image/position_embed", "pos_embedding", layouts.BATCHED),
        *_encoder("image", "Transformer"),
        *(_pool("image_pool") if pooled else []),
        *(_dense("image_projection", "head") if head else []),
    ]
    params, theirs = towers.arrange(tree, rows, config.depth, {"p": patch})
    params["image/position_embed"] = towers.with_class_position(
        params["image/position_embed"], grid, token
    )
    theirs = {k: original[v] for k, v in theirs.items()}
    return Tower(config, params, theirs, tuple(assumed), prefix="")


def _text(tree: Tree, settings: Settings) -> Tower[config_lib.TextTower]:
    tree, original = _renamed(tree)
    extra = tree.pop("Encoder_0/pos_embedding", None)
    _, length, _ = _shape(tree, "pos_embedding", 3)
    if extra is not None:  # old files add positions twice
        tree["pos_embedding"] = tree["pos_embedding"] + extra
    vocab, _ = _shape(tree, "Embed_0/embedding", 2)
    pooled, head = "MAPHead_0/probe" in tree, "head/kernel" in tree
    pad_id = settings.pad_id
    if pad_id is None:
        pad_id = 1 if vocab == 32000 else 0
    config = config_lib.TextTower(
        **_sizes(tree, "Encoder_0"),
        vocab_size=vocab,
        context_length=length,
        norm_eps=1e-6,
        unroll=1,
        causal=False,
        activation=_activation("text", settings),
        pool="map" if pooled else "last",
        projection="affine" if head else "none",
        tokenizer="siglip.model",
        cleaning="canonical",
        pad_id=pad_id,
    )
    assumed = [
        "norm epsilon 1e-6 and tanh GELU, its models'",
        f"texts padded with the id {pad_id}" + ("" if pooled else "; pool last, its default"),
    ]
    rows = [
        Row("text/token_embed/embedding", "Embed_0/embedding"),
        Row("text/position_embed", "pos_embedding", layouts.BATCHED),
        *_encoder("text", "Encoder_0"),
        *(_pool("text_pool") if pooled else []),
        *(_dense("text_projection", "head") if head else []),
    ]
    params, theirs = towers.arrange(tree, rows, config.depth, {})
    theirs = {k: original[v] for k, v in theirs.items()}
    if extra is not None:
        theirs["text/position_embed (added)"] = "Encoder_0/pos_embedding"
    return Tower(config, params, theirs, tuple(assumed), prefix="")
