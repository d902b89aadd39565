"""The table of the PyTorch reference, and the sizes that its entries tell.

It has two state dicts: the names of the towers' entries begin with "backbone." here, others with "decoder.".
What it lacks has other names: `pre_norm`, registers, gates, layer scale, `logit_bias`, pooling heads, biases
of projections, the box head; `hf_files/modeling_grain.py` has all. Its "decoder" of two towers pools the
image tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import formats, tables, towers
from grain_jax.convert.exits import needs
from grain_jax.convert.faults import raise_any
from grain_jax.convert.tables import Arrays, Entries, NamePair
from grain_jax.models import grain

TOWERS = ("image", "text", "decoder")
_POOL = formats.pool("attention.in_proj_ attention.out_proj")
_DECODER = {
    "norm_1": "norm1",
    "self_attention": "self_attn.in_proj_ self_attn.out_proj",
    "norm_2": "norm2",
    "cross_attention": "multihead_attn.in_proj_ multihead_attn.out_proj",
    "norm_3": "norm3",
    "mlp/in": "linear1",
    "mlp/out": "linear2",
}
_HEADS = {
    "decoder/memory_projection": "proj",
    "decoder/memory_norm": "transformer.pre_norm",
    "decoder/query_embed": "query_embed.weight",
    "decoder/norm": "transformer.decoder.norm",
    **{f"box_mlp/layer_{i}": f"bbox_embed.layers.{i}" for i in range(3)},
    **{f"pointer/layer_{i}": f"pointer.layers.{i}" for i in range(2)},
    "pointer/query": "pointer.query",
    "pointer/key": "pointer.key",
    "image_projection/kernel": "img_proj",
    "image_projection/bias": "img_proj_bias",
    "region_projection/kernel": "obj_proj",
    "box_projection/kernel": "boxes.proj",
}


def _part(part: str, *rows: NamePair) -> list[NamePair]:
    """Puts the name of a state dict before its entries'."""
    return [row._replace(theirs=f"{part}.{row.theirs}") for row in rows]


TABLE = [
    *_part(
        "backbone",
        *formats.own_image("visual."),
        *formats.openai_text(),
        *formats.rows("", "", {"text_projection/bias": "text_projection_bias"}),
        *formats.rows("text_pool/", "text_pool.", _POOL),
        *towers.SCALARS,
    ),
    *_part(
        "decoder",
        *formats.rows("decoder/blocks/", "transformer.decoder.layers.{}.", _DECODER),
        *formats.rows("", "", _HEADS),
        *formats.rows("image_pool/", "pool.", _POOL),
        NamePair("region_logit_scale", "logit_scale"),
        NamePair("region_logit_bias", "logit_bias"),
    ),
]
# Entries of the reference that no output of GRAIN depends on.
UNUSED = (
    "backbone.image_projection",
    *("decoder.pos_embed", "decoder.temporal_embed"),
    *("decoder.class_embed.weight", "decoder.class_embed.bias"),
)
# (tower, width) -> heads of the reference's own models (clip/custom_models.py and training script).
REFERENCE_HEADS = {
    ("image", 384): 12,
    ("image", 768): 12,
    ("image", 1024): 16,
    ("text", 512): 8,
    ("decoder", 512): 8,
}


def to_params(state: Mapping[str, np.ndarray], model: config_lib.Model) -> dict:
    """The reference's entries, as "backbone.NAME" and "decoder.NAME", as our parameters, nested, float32.

    Raises:
      ConvertError: unknown or missing keys, other shapes, values that are not finite; one line per fault.
    """
    return tables.nested(tables.read(TABLE, state, grain.parameter_shapes(model), UNUSED))


def state_dict(params: Any) -> Arrays:
    """Our parameters (or their gradients), a nested dict, as the entries of the modeling file.

    It has biases of keys, zeros where the tower has none. Raises ValueError for a parameter that no row has.
    """
    flat = grain.flat(params)
    bias = "image/blocks/attention/{}/bias"
    return tables.write(TABLE, {bias.format("key"): np.zeros_like(flat[bias.format("query")]), **flat})


def reference_state(model: config_lib.Model, params: Any) -> Arrays:
    """Our parameters as all entries of the reference, with zeros for those that it does not use.

    Raises:
      ConvertError: the reference cannot express the model; one line per reason.
    """
    raise_any(needs.TORCH.faults(model))
    assert model.decoder is not None  # else refused
    width = model.decoder.width
    # Shapes as in its training script: 22,047 classes and one for "no object".
    classes = (1, 513, width), (1, 4, width), (22048, width), (22048,)
    shapes = zip(UNUSED, ((model.image.width, model.embed_dim), *classes), strict=True)
    return state_dict(params) | {name: np.zeros(shape, np.float32) for name, shape in shapes}


def infer(
    state: Mapping[str, np.ndarray], heads: Mapping[str, int | None]
) -> tuple[config_lib.Model, list[str]]:
    """The model that these entries are the parameters of, and a line for each assumption in it.

    No entry has the number of heads: it comes from `heads` ("image", "text", "decoder" -> number or
    None), from the size of the qk-norm, or is assumed.

    Raises:
      ConvertError: an array that gives a size is missing or has another number of axes, or heads do not fit.
    """
    entries = Entries(state, TABLE)
    queries, width = entries.shape("decoder/query_embed", 2)
    # Norm epsilons and dropout are constants of the reference; the initialisers are not used.
    more = dict(queries=queries - 1, width=width, dropout=0.1, norm_eps=1e-5)
    sizes: dict[str, dict[str, Any]] = {
        "image": towers.image_sizes(entries) | dict(norm_eps=1e-6, projection="matrix"),
        "text": towers.text_sizes(entries) | dict(norm_eps=1e-5),
        "decoder": towers.block_sizes(entries, "decoder") | more,
    }
    assumed, faults = [], []
    for tower, fields in sizes.items():
        width, stated = fields["width"], None
        if tower == "image" and fields["qk_norm"]:  # the norm has the size of a head
            stated = width // entries.shape("image/blocks/attention/query_norm/scale", 1)[0]
        usual = REFERENCE_HEADS.get((tower, width), None if width % 64 else width // 64)
        flag = heads.get(tower)
        number = next((x for x in (flag, stated, usual) if x is not None), None)
        if number is None:
            faults.append(f"--{tower}-heads: must be given; the width {width} does not tell them")
        elif number < 1 or width % number or stated not in (None, number):
            expected = f"a divisor of the width {width}" if stated is None else stated
            faults.append(f"{tower} heads: got {number}, expected {expected}")
        elif flag is stated is None:
            assumed.append(f"ASSUMED  {tower}: {number} heads; --{tower}-heads says otherwise")
        fields["heads"] = number
    raise_any(faults)
    model = config_lib.Model(
        embed_dim=entries.shape("text_projection/kernel", 2)[1],
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
        image=config_lib.ImageTower(**sizes["image"]),
        text=config_lib.TextTower(**sizes["text"]),
        decoder=config_lib.RegionDecoder(**sizes["decoder"]),
    )
    return model, assumed
