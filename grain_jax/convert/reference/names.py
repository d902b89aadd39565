"""The table of parameters: our name, the entry of the PyTorch reference, its shape and its layout.

`{}` in the entry is the layer; our parameters are stacked over layers on the first axis. Shapes are of the
reference, in the letters of `sizes.sizes_of`. The table serves both directions.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert.layouts import (
    BATCHED,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    PATCHES,
    SAME,
    TOKEN,
    Layout,
    Sizes,
    get,
)


class Row(NamedTuple):
    """A parameter of ours and the torch entry, or third of an entry, that holds it."""

    ours: str
    theirs: str
    shape: str  # of the torch entry, per layer
    layout: Layout = SAME
    third: int | None = None  # query, key and value are stacked in one torch entry


class Table(NamedTuple):
    """The rows of one tower."""

    tower: str  # its name in `config.Model`
    module: str  # its state dict: "backbone" or "decoder"
    rows: tuple[Row, ...]


# fmt: off
IMAGE = Table("image", "backbone", (
    # E width, N positions, p patch, F MLP, K heads, h head_dim
    Row("image/class_token", "visual.cls_token", "1 1 E", TOKEN),
    Row("image/position_embed", "visual.pos_embed", "1 N E", BATCHED),
    Row("image/patch_embed/kernel", "visual.patch_embed.proj.weight", "E 3 p p", PATCHES),
    Row("image/patch_embed/bias", "visual.patch_embed.proj.bias", "E"),
    Row("image/pre_norm/scale", "visual.norm_pre.weight", "E"),
    Row("image/pre_norm/bias", "visual.norm_pre.bias", "E"),
    Row("image/blocks/norm_1/scale", "visual.blocks.{}.norm1.weight", "E"),
    Row("image/blocks/norm_1/bias", "visual.blocks.{}.norm1.bias", "E"),
    Row("image/blocks/attention/query/kernel", "visual.blocks.{}.attn.qkv.weight", "3E E", HEADS_IN, 0),
    Row("image/blocks/attention/query/bias", "visual.blocks.{}.attn.qkv.bias", "3E", HEADS_IN, 0),
    Row("image/blocks/attention/key/kernel", "visual.blocks.{}.attn.qkv.weight", "3E E", HEADS_IN, 1),
    Row("image/blocks/attention/key/bias", "visual.blocks.{}.attn.qkv.bias", "3E", HEADS_IN, 1),
    Row("image/blocks/attention/value/kernel", "visual.blocks.{}.attn.qkv.weight", "3E E", HEADS_IN, 2),
    Row("image/blocks/attention/value/bias", "visual.blocks.{}.attn.qkv.bias", "3E", HEADS_IN, 2),
    Row("image/blocks/attention/query_norm/scale", "visual.blocks.{}.attn.q_norm.weight", "h"),
    Row("image/blocks/attention/query_norm/bias", "visual.blocks.{}.attn.q_norm.bias", "h"),
    Row("image/blocks/attention/key_norm/scale", "visual.blocks.{}.attn.k_norm.weight", "h"),
    Row("image/blocks/attention/key_norm/bias", "visual.blocks.{}.attn.k_norm.bias", "h"),
    Row("image/blocks/attention/out/kernel", "visual.blocks.{}.attn.proj.weight", "E E", HEADS_OUT),
    Row("image/blocks/attention/out/bias", "visual.blocks.{}.attn.proj.bias", "E"),
    Row("image/blocks/norm_2/scale", "visual.blocks.{}.norm2.weight", "E"),
    Row("image/blocks/norm_2/bias", "visual.blocks.{}.norm2.bias", "E"),
    Row("image/blocks/mlp/in/kernel", "visual.blocks.{}.mlp.fc1.weight", "F E", LINEAR),
    Row("image/blocks/mlp/in/bias", "visual.blocks.{}.mlp.fc1.bias", "F"),
    Row("image/blocks/mlp/out/kernel", "visual.blocks.{}.mlp.fc2.weight", "E F", LINEAR),
    Row("image/blocks/mlp/out/bias", "visual.blocks.{}.mlp.fc2.bias", "E"),
    Row("image/norm/scale", "visual.norm.weight", "E"),
    Row("image/norm/bias", "visual.norm.bias", "E"),
))
TEXT = Table("text", "backbone", (
    # E width, V vocabulary, L context, F MLP, K heads, h head_dim, D joint embedding
    Row("text/token_embed/embedding", "token_embedding.weight", "V E"),
    Row("text/position_embed", "positional_embedding", "L E"),
    Row("text/blocks/norm_1/scale", "transformer.resblocks.{}.ln_1.weight", "E"),
    Row("text/blocks/norm_1/bias", "transformer.resblocks.{}.ln_1.bias", "E"),
    Row("text/blocks/attention/query/kernel", "transformer.resblocks.{}.attn.in_proj_weight", "3E E", HEADS_IN, 0),
    Row("text/blocks/attention/query/bias", "transformer.resblocks.{}.attn.in_proj_bias", "3E", HEADS_IN, 0),
    Row("text/blocks/attention/key/kernel", "transformer.resblocks.{}.attn.in_proj_weight", "3E E", HEADS_IN, 1),
    Row("text/blocks/attention/key/bias", "transformer.resblocks.{}.attn.in_proj_bias", "3E", HEADS_IN, 1),
    Row("text/blocks/attention/value/kernel", "transformer.resblocks.{}.attn.in_proj_weight", "3E E", HEADS_IN, 2),
    Row("text/blocks/attention/value/bias", "transformer.resblocks.{}.attn.in_proj_bias", "3E", HEADS_IN, 2),
    Row("text/blocks/attention/out/kernel", "transformer.resblocks.{}.attn.out_proj.weight", "E E", HEADS_OUT),
    Row("text/blocks/attention/out/bias", "transformer.resblocks.{}.attn.out_proj.bias", "E"),
    Row("text/blocks/norm_2/scale", "transformer.resblocks.{}.ln_2.weight", "E"),
    Row("text/blocks/norm_2/bias", "transformer.resblocks.{}.ln_2.bias", "E"),
    Row("text/blocks/mlp/in/kernel", "transformer.resblocks.{}.mlp.c_fc.weight", "F E", LINEAR),
    Row("text/blocks/mlp/in/bias", "transformer.resblocks.{}.mlp.c_fc.bias", "F"),
    Row("text/blocks/mlp/out/kernel", "transformer.resblocks.{}.mlp.c_proj.weight", "E F", LINEAR),
    Row("text/blocks/mlp/out/bias", "transformer.resblocks.{}.mlp.c_proj.bias", "E"),
    Row("text_norm/scale", "ln_final.weight", "E"),
    Row("text_norm/bias", "ln_final.bias", "E"),
    Row("text_projection/kernel", "text_projection", "E D"),
    Row("logit_scale", "logit_scale", ""),
    Row("logit_bias", "logit_bias", ""),
))
_LAYER = "transformer.decoder.layers.{}."
DECODER = Table("decoder", "decoder", (
    # E width, I image width, Q+1 queries (the last is the image's), F MLP, K heads, h head_dim, D joint embedding
    Row("decoder/memory_projection/kernel", "proj.weight", "E I", LINEAR),
    Row("decoder/memory_norm/scale", "transformer.pre_norm.weight", "E"),
    Row("decoder/memory_norm/bias", "transformer.pre_norm.bias", "E"),
    Row("decoder/query_embed", "query_embed.weight", "Q+1 E"),
    Row("decoder/blocks/norm_1/scale", _LAYER + "norm1.weight", "E"),
    Row("decoder/blocks/norm_1/bias", _LAYER + "norm1.bias", "E"),
    Row("decoder/blocks/self_attention/query/kernel", _LAYER + "self_attn.in_proj_weight", "3E E", HEADS_IN, 0),
    Row("decoder/blocks/self_attention/query/bias", _LAYER + "self_attn.in_proj_bias", "3E", HEADS_IN, 0),
    Row("decoder/blocks/self_attention/key/kernel", _LAYER + "self_attn.in_proj_weight", "3E E", HEADS_IN, 1),
    Row("decoder/blocks/self_attention/key/bias", _LAYER + "self_attn.in_proj_bias", "3E", HEADS_IN, 1),
    Row("decoder/blocks/self_attention/value/kernel", _LAYER + "self_attn.in_proj_weight", "3E E", HEADS_IN, 2),
    Row("decoder/blocks/self_attention/value/bias", _LAYER + "self_attn.in_proj_bias", "3E", HEADS_IN, 2),
    Row("decoder/blocks/self_attention/out/kernel", _LAYER + "self_attn.out_proj.weight", "E E", HEADS_OUT),
    Row("decoder/blocks/self_attention/out/bias", _LAYER + "self_attn.out_proj.bias", "E"),
    Row("decoder/blocks/norm_2/scale", _LAYER + "norm2.weight", "E"),
    Row("decoder/blocks/norm_2/bias", _LAYER + "norm2.bias", "E"),
    Row("decoder/blocks/cross_attention/query/kernel", _LAYER + "multihead_attn.in_proj_weight", "3E E", HEADS_IN, 0),
    Row("decoder/blocks/cross_attention/query/bias", _LAYER + "multihead_attn.in_proj_bias", "3E", HEADS_IN, 0),
    Row("decoder/blocks/cross_attention/key/kernel", _LAYER + "multihead_attn.in_proj_weight", "3E E", HEADS_IN, 1),
    Row("decoder/blocks/cross_attention/key/bias", _LAYER + "multihead_attn.in_proj_bias", "3E", HEADS_IN, 1),
    Row("decoder/blocks/cross_attention/value/kernel", _LAYER + "multihead_attn.in_proj_weight", "3E E", HEADS_IN, 2),
    Row("decoder/blocks/cross_attention/value/bias", _LAYER + "multihead_attn.in_proj_bias", "3E", HEADS_IN, 2),
    Row("decoder/blocks/cross_attention/out/kernel", _LAYER + "multihead_attn.out_proj.weight", "E E", HEADS_OUT),
    Row("decoder/blocks/cross_attention/out/bias", _LAYER + "multihead_attn.out_proj.bias", "E"),
    Row("decoder/blocks/norm_3/scale", _LAYER + "norm3.weight", "E"),
    Row("decoder/blocks/norm_3/bias", _LAYER + "norm3.bias", "E"),
    Row("decoder/blocks/mlp/in/kernel", _LAYER + "linear1.weight", "F E", LINEAR),
    Row("decoder/blocks/mlp/in/bias", _LAYER + "linear1.bias", "F"),
    Row("decoder/blocks/mlp/out/kernel", _LAYER + "linear2.weight", "E F", LINEAR),
    Row("decoder/blocks/mlp/out/bias", _LAYER + "linear2.bias", "E"),
    Row("decoder/norm/scale", "transformer.decoder.norm.weight", "E"),
    Row("decoder/norm/bias", "transformer.decoder.norm.bias", "E"),
    Row("box_mlp/layer_0/kernel", "bbox_embed.layers.0.weight", "E E", LINEAR),
    Row("box_mlp/layer_0/bias", "bbox_embed.layers.0.bias", "E"),
    Row("box_mlp/layer_1/kernel", "bbox_embed.layers.1.weight", "E E", LINEAR),
    Row("box_mlp/layer_1/bias", "bbox_embed.layers.1.bias", "E"),
    Row("box_mlp/layer_2/kernel", "bbox_embed.layers.2.weight", "4 E", LINEAR),
    Row("box_mlp/layer_2/bias", "bbox_embed.layers.2.bias", "4"),
    Row("image_projection/kernel", "img_proj", "E D"),
    Row("region_projection/kernel", "obj_proj", "E D"),
))
BOXES = Table("boxes", "decoder", (
    # E width of the image tower, F MLP, K heads, h head_dim, P numbers of a place, B input of the projection, D joint
    # embedding
    Row("box_head/place/kernel", "boxes.place.weight", "E P", LINEAR),
    Row("box_head/place/bias", "boxes.place.bias", "E"),
    Row("box_head/memory_projection/kernel", "boxes.memory_proj.weight", "E E", LINEAR),
    Row("box_head/memory_projection/bias", "boxes.memory_proj.bias", "E"),
    Row("box_head/memory_norm/scale", "boxes.memory_norm.weight", "E"),
    Row("box_head/memory_norm/bias", "boxes.memory_norm.bias", "E"),
    Row("box_head/norm_1/scale", "boxes.norm1.weight", "E"),
    Row("box_head/norm_1/bias", "boxes.norm1.bias", "E"),
    Row("box_head/attention/query/kernel", "boxes.attn.in_proj_weight", "3E E", HEADS_IN, 0),
    Row("box_head/attention/query/bias", "boxes.attn.in_proj_bias", "3E", HEADS_IN, 0),
    Row("box_head/attention/key/kernel", "boxes.attn.in_proj_weight", "3E E", HEADS_IN, 1),
    Row("box_head/attention/key/bias", "boxes.attn.in_proj_bias", "3E", HEADS_IN, 1),
    Row("box_head/attention/value/kernel", "boxes.attn.in_proj_weight", "3E E", HEADS_IN, 2),
    Row("box_head/attention/value/bias", "boxes.attn.in_proj_bias", "3E", HEADS_IN, 2),
    Row("box_head/attention/out/kernel", "boxes.attn.out_proj.weight", "E E", HEADS_OUT),
    Row("box_head/attention/out/bias", "boxes.attn.out_proj.bias", "E"),
    Row("box_head/norm_2/scale", "boxes.norm2.weight", "E"),
    Row("box_head/norm_2/bias", "boxes.norm2.bias", "E"),
    Row("box_head/mlp/in/kernel", "boxes.mlp.fc1.weight", "F E", LINEAR),
    Row("box_head/mlp/in/bias", "boxes.mlp.fc1.bias", "F"),
    Row("box_head/mlp/out/kernel", "boxes.mlp.fc2.weight", "E F", LINEAR),
    Row("box_head/mlp/out/bias", "boxes.mlp.fc2.bias", "E"),
    Row("box_head/norm/scale", "boxes.norm.weight", "E"),
    Row("box_head/norm/bias", "boxes.norm.bias", "E"),
    Row("box_projection/kernel", "boxes.proj", "B D"),
))
# fmt: on
TABLES = (IMAGE, TEXT, DECODER, BOXES)

# Parameters that only some models have. The reference has all of them but pre_norm (here under timm's name),
# logit_bias and the box head.
OPTIONAL: tuple[tuple[str, Callable[[config_lib.Model], bool]], ...] = (
    ("image/pre_norm/", lambda m: m.image.pre_norm),
    ("image/class_token", lambda m: m.image.class_token),
    ("image/patch_embed/bias", lambda m: m.image.patch_bias),
    ("image/blocks/attention/(query|key)_norm/", lambda m: m.image.qk_norm),
    ("logit_bias", lambda m: m.logit_bias_init is not None),
    ("box_head/", lambda m: m.boxes.kind == "prompter"),
    ("box_projection/", lambda m: m.boxes.kind != "none"),
)

# Entries of the reference that no output of GRAIN depends on. Shapes as in its train.py, in the letters of the
# image tower (backbone) and of the decoder; class_embed has 22,047 classes and one for "no object".
UNUSED = {
    "backbone": {"image_projection": "E D"},
    "decoder": {
        "pos_embed": "1 513 E",
        "temporal_embed": "1 4 E",
        "class_embed.weight": "22048 E",
        "class_embed.bias": "22048",
    },
}


def is_in(row: Row, model: config_lib.Model) -> bool:
    """Whether `model` has the parameter."""
    return all(has(model) for pattern, has in OPTIONAL if re.match(pattern, row.ours))


def unused(sizes: Mapping[str, Sizes]) -> dict[str, dict[str, np.ndarray]]:
    """The unused entries of the reference as zeros: {"backbone": ..., "decoder": ...}."""
    return {
        module: {
            name: np.zeros([_dimension(word, sizes[tower]) for word in shape.split()], np.float32)
            for name, shape in UNUSED[module].items()
        }
        for module, tower in (("backbone", "image"), ("decoder", "decoder"))
    }


def shape_of(row: Row, sizes: Sizes) -> tuple[int, ...]:
    """The shape of the torch entry: `row.shape` with the letters replaced."""
    return tuple(_dimension(word, sizes) for word in row.shape.split())


def _dimension(word: str, sizes: Sizes) -> int:
    if word.isdigit():
        return int(word)
    if word.startswith("3"):
        return 3 * sizes[word[1:]]
    if word.endswith("+1"):
        return sizes[word[:-2]] + 1
    return sizes[word]


def to_ours(row: Row, array: np.ndarray, sizes: Sizes) -> np.ndarray:
    """The torch entry of one layer as our parameter."""
    if row.third is not None:
        array = np.split(array, 3)[row.third]
    return np.asarray(row.layout.ours(array, sizes), order="C")


def to_theirs(row: Row, array: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Our parameter of one layer as the torch entry, or as a third of it for query, key and value."""
    return np.asarray(row.layout.theirs(array, sizes), order="C")


def state_dicts(params: Any, sizes: Mapping[str, Sizes]) -> dict[str, dict[str, np.ndarray]]:
    """Our parameters (or their gradients) under the reference's names: {"backbone": ..., "decoder": ...}.

    Args:
      params: nested dict, as `GRAIN.init` gives.
      sizes: of each tower, as `sizes.sizes_of` gives.

    Returns:
      The entries of each module, without the unused ones.

    Raises:
      ValueError: a parameter that no row has.
    """
    lost = set(_paths(params)) - {row.ours for table in TABLES for row in table.rows}
    if lost:
        raise ValueError(f"parameters without a name in torch: {', '.join(sorted(lost))}")
    out: dict[str, dict[str, np.ndarray]] = {"backbone": {}, "decoder": {}}
    for tower, module, rows in TABLES:
        for row in rows:
            leaf = get(params, row.ours)
            if leaf is None:
                continue  # an optional parameter
            layers = range(sizes[tower]["layers"]) if "{}" in row.theirs else (None,)
            for i in layers:
                array = np.asarray(leaf if i is None else leaf[i])
                name = row.theirs.format(i)
                array = to_theirs(row, array, sizes[tower])
                if row.third:
                    array = np.concatenate([out[module][name], array])
                out[module][name] = array
    return out


def _paths(tree: Mapping, above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from _paths(value, f"{above}{key}/") if isinstance(value, Mapping) else [above + key]
