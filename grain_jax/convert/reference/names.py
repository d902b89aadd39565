"""The table of the PyTorch reference, and the sizes that its state dicts tell.

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
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.models import grain

TOWERS = ("image", "text", "decoder")
StateDicts = Mapping[str, Mapping[str, np.ndarray]]  # {"backbone": ..., "decoder": ...}


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
TABLES: dict[str, list[NamePair]] = {  # by state dict
    "backbone": [
        *formats.own_image("visual."),
        *formats.openai_text(),
        *formats.rows("", "", {"text_projection/bias": "text_projection_bias"}),
        *formats.rows("text_pool/", "text_pool.", _POOL),
        *towers.SCALARS,
    ],
    "decoder": [
        *formats.rows("decoder/blocks/", "transformer.decoder.layers.{}.", _DECODER),
        *formats.rows(
            "",
            "",
            {
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
            },
        ),
        *formats.rows("image_pool/", "pool.", _POOL),
        NamePair("region_logit_scale", "logit_scale"),
        NamePair("region_logit_bias", "logit_bias"),
    ],
}
# Entries of the reference that no output of GRAIN depends on.
UNUSED = {
    "backbone": ("image_projection",),
    "decoder": ("pos_embed", "temporal_embed", "class_embed.weight", "class_embed.bias"),
}
# (tower, width) -> heads of the reference's own models (clip/custom_models.py and training script).
REFERENCE_HEADS = {
    ("image", 384): 12,
    ("image", 768): 12,
    ("image", 1024): 16,
    ("text", 512): 8,
    ("decoder", 512): 8,
}


def to_params(backbone: Any, decoder: Any, model: config_lib.Model) -> dict:
    """The reference's two state dicts as our parameters, a nested dict of float32 arrays.

    Raises:
      ConvertError: unknown or missing keys, other shapes, values that are not finite; one line per fault.
    """
    shapes = grain.parameter_shapes(model)
    params: dict[str, np.ndarray] = {}
    faults = []
    for module, state in (("backbone", backbone), ("decoder", decoder)):
        shapes_of_part = {x.ours: shapes[x.ours] for x in TABLES[module] if x.ours in shapes}
        try:
            with prefixed(f"{module} "):
                params |= tables.read(TABLES[module], state, shapes_of_part, UNUSED[module])
        except ConvertError as error:
            faults.append(str(error))
    raise_any(faults)
    return tables.nested(params)


def state_dicts(params: Any) -> dict[str, dict[str, np.ndarray]]:
    """Our parameters (or their gradients), a nested dict, as the two state dicts, without the unused entries.

    The modeling file has biases of keys, zeros where the tower has none. Raises ValueError for a parameter
    that no row has.
    """
    flat = grain.flat(params)
    bias = "image/blocks/attention/{}/bias"
    flat = {bias.format("key"): np.zeros_like(flat[bias.format("query")]), **flat}
    backbone = {row.ours: flat.pop(row.ours) for row in TABLES["backbone"] if row.ours in flat}
    parts = {"backbone": backbone, "decoder": flat}
    return {module: tables.write(TABLES[module], part) for module, part in parts.items()}


def to_states(model: config_lib.Model, params: Any) -> dict[str, dict[str, np.ndarray]]:
    """Our parameters as the reference's two state dicts, with zeros for its unused entries.

    Raises:
      ConvertError: the reference cannot express the model; one line per reason.
    """
    raise_any(needs.TORCH.faults(model))
    assert model.decoder is not None  # else refused
    image, decoder = model.image, model.decoder
    used = state_dicts(params)
    zeros = lambda *shape: np.zeros(shape, np.float32)
    # Shapes as in its training script: 22,047 classes and one for "no object".
    used["backbone"]["image_projection"] = zeros(image.width, model.embed_dim)
    shapes = ((1, 513, decoder.width), (1, 4, decoder.width), (22048, decoder.width), (22048,))
    used["decoder"] |= {name: zeros(*s) for name, s in zip(UNUSED["decoder"], shapes)}
    return used


def infer(states: StateDicts, heads: Mapping[str, int | None]) -> tuple[config_lib.Model, list[str]]:
    """The model that these state dicts are the parameters of, and a line for each assumption in it.

    No state dict has the number of heads: it comes from `heads` ("image", "text", "decoder" -> number or
    None), from the size of the qk-norm, or is assumed.

    Raises:
      ConvertError: an array that gives a size is missing or has another number of axes, or heads do not fit.
    """
    backbone, decoder = (Entries(states[module], rows) for module, rows in TABLES.items())
    queries, width = decoder.shape("decoder/query_embed", 2)
    # Norm epsilons and dropout are constants of the reference; the initialisers are not used.
    more = dict(queries=queries - 1, width=width, dropout=0.1, norm_eps=1e-5)
    sizes: dict[str, dict[str, Any]] = {
        "image": towers.image_sizes(backbone) | dict(norm_eps=1e-6, projection="matrix"),
        "text": towers.text_sizes(backbone) | dict(norm_eps=1e-5),
        "decoder": towers.block_sizes(decoder, "decoder") | more,
    }
    assumed, faults = [], []
    for tower, fields in sizes.items():
        width, stated = fields["width"], None
        if tower == "image" and fields["qk_norm"]:  # the norm has the size of a head
            stated = width // backbone.shape("image/blocks/attention/query_norm/scale", 1)[0]
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
        embed_dim=backbone.shape("text_projection/kernel", 2)[1],
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
        image=config_lib.ImageTower(**sizes["image"]),
        text=config_lib.TextTower(**sizes["text"]),
        decoder=config_lib.RegionDecoder(**sizes["decoder"]),
    )
    return model, assumed
