"""Floating-point operations: of a JAX function, of the model per image, and the peak of a chip.

Matrix products and convolutions alone are counted, a multiply-add as two. Element-wise work is left out, as is
usual for model FLOPs, so no number depends on the backend.
"""

import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from grain_jax import config as config_lib
from grain_jax import named
from grain_jax.config import Config
from grain_jax.models import box_head, grain, towers

# Dense bfloat16 FLOPs per second by `jax.Device.device_kind`, from the data sheets of the vendors. A device is
# a chip; on TPU7x it is half a chip.
_TPU_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
}
# By the start of the name (the rest names memory and socket); the first match counts.
_GPU_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak matrix-product FLOPs per second of one device.

    Args:
      device_kind: as `jax.Device.device_kind`.
      dtype: of the operands, "bfloat16" or "float32". At JAX's default precision float32 operands are cut to
        bfloat16 on TPU, and to TF32, which has half of bfloat16's rate, on these GPUs.

    Returns:
      FLOPs per second; None for a CPU, a part of a GPU (MIG) and a device that is not in the table.
    """
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind]
    if "MIG" in device_kind:
        return None
    peak = next((p for name, p in _GPU_PEAKS.items() if device_kind.startswith(name)), None)
    return peak / 2 if peak and dtype == "float32" else peak


class PerImage(NamedTuple):
    """FLOPs of a forward pass per image."""

    image: float  # the image tower
    text: float  # the text tower over the rows per image, and the projection of its texts
    decoder: (
        float  # the region decoder, its projections before and after, its boxes, and the box head
    )
    losses: float  # similarities
    frozen: frozenset[str] = (
        frozenset()
    )  # those of image, text and decoder without a trained parameter

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass."""
        return self.image + self.text + self.decoder + self.losses

    @property
    def train(self) -> float:
        """FLOPs of forward and backward pass without recomputation: a product has two in its backward pass.

        A frozen part has none, except a decoder on a trained image tower: it has one, for the gradient of its
        input. A part that is frozen in parts counts as trained.
        """
        backward = 2 * self.forward
        for part in self.frozen:
            through = part == "decoder" and "image" not in self.frozen
            backward -= getattr(self, part) * (1 if through else 2)
        return self.forward + backward


def per_image(config: Config) -> PerImage:
    """FLOPs of the model per image of a batch, by closed formulas.

    Attention counts masked pairs, and rows count their padding: both are computed. Only the losses depend on the
    batch size (or `loss.group_size`); the terms of `loss.terms` are not counted, nor the sums of `loss.hard_negative`,
    which are no matrix products. A tower from outside of the package has no formula: it is traced, and its products
    and convolutions are counted.
    """
    image, text, decoder = config.model.image, config.model.text, config.model.decoder
    embed, regions = config.model.embed_dim, config.input.max_regions
    captions = config.input.captions_per_image
    image_tower, tokens, width = _image_tower(config)

    group, rows_of_group = config.text_layout
    rows = rows_of_group / group
    length = text.context_length
    text_tower = _text_tower(config, rows)
    if text.pool == "map":
        text_tower += rows * (_attention(text, 1, length) + _mlp(text, 1))
    if text.projection != "none":
        text_tower += 2 * config.input.texts_per_image * text.width * embed

    if decoder is None:
        region_decoder = 0
        if image.pool == "map":
            image_tower += _attention(image, 1, tokens) + _mlp(image, 1)
        if image.projection != "none":
            image_tower += 2 * width * embed
    else:
        queries = decoder.queries + 1
        layer = _attention(decoder, queries, queries) + _attention(decoder, queries, tokens)
        layer += _mlp(decoder, queries)
        layer += 2 * decoder.queries * (2 * decoder.width**2 + 4 * decoder.width)  # boxes
        region_decoder = 2 * tokens * width * decoder.width + decoder.depth * layer
        region_decoder += 2 * queries * decoder.width * embed

    region_decoder += _box_head(config, tokens, width)

    group = config.loss.group_size or config.batch_size
    losses = 2 * captions * config.batch_size * embed + 2 * regions * (group * regions) * embed
    if config.loss.image_description:
        losses += 2 * regions * config.batch_size * embed
    if config.loss.box_description:
        losses += 2 * regions * (group * regions) * embed
    if config.loss.match_description and decoder is not None:
        losses += 2 * decoder.queries * regions * embed
    return PerImage(image_tower, text_tower, region_decoder, losses, _frozen(config))


def _image_tower(config: Config) -> tuple[float, int, int]:
    """(FLOPs an image, tokens, their width) of the image tower."""
    image = config.model.image
    if not named.is_external(image.tower):
        patches = (image.image_size // image.patch_size) ** 2
        tokens = image.class_token + patches
        flops = 2 * patches * 3 * image.patch_size**2 * image.width
        flops += image.depth * (_attention(image, tokens, tokens) + _mlp(image, tokens))
        return flops, tokens, image.width
    pixels = jax.ShapeDtypeStruct((1, image.image_size, image.image_size, 3), np.float32)
    flops, out = _traced(towers.image_tower(image)(image, np.dtype(config.dtype)), pixels)
    return flops, 1 if len(out.shape) == 2 else out.shape[1], out.shape[-1]


def _box_head(config: Config, tokens: int, width: int) -> float:
    """FLOPs an image of the box head and its projection; RoIAlign's backward pass has one product, not two."""
    head, image, boxes = config.model.boxes, config.model.image, config.input.max_regions
    if head.kind == "none":
        return 0
    if head.kind == "prompter":
        place = 2 * box_head.PLACE * image.width
        places = boxes * place + tokens * place / config.batch_size  # of tokens once a batch
        memory = 2 * tokens * width * image.width
        layer = _attention(image, boxes, tokens) + _mlp(image, boxes)
        return places + memory + layer + 2 * boxes * image.width * config.model.embed_dim
    leading = towers.image_tower(image).leading_tokens(image)
    grid = box_head.grid_size(tokens, leading)
    align = 2 * boxes * head.bins * (grid * grid + head.bins * grid) * width
    return align + 2 * boxes * head.bins**2 * width * config.model.embed_dim


def _text_tower(config: Config, rows: float) -> float:
    """FLOPs of the text tower for so many rows."""
    text, length = config.model.text, config.model.text.context_length
    if not named.is_external(text.tower):
        return rows * text.depth * (_attention(text, length, length) + _mlp(text, length))
    row = jax.ShapeDtypeStruct((1, 1, length), np.int32)
    tower = towers.text_tower(text)(text, np.dtype(config.dtype))
    return rows * _traced(tower, row, row, row)[0]


def _traced(tower: nn.Module, *inputs: jax.ShapeDtypeStruct) -> tuple[int, jax.ShapeDtypeStruct]:
    """(FLOPs, output) of a tower, traced with these inputs."""
    variables = nn.meta.unbox(jax.eval_shape(tower.init, jax.random.key(0), *inputs))
    out = jax.eval_shape(tower.apply, variables, *inputs)
    return matmul_flops(tower.apply, variables, *inputs), out


def _frozen(config: Config) -> frozenset[str]:
    """The parts of image, text and decoder of which `optim.frozen` matches every parameter."""
    if not config.optim.frozen:
        return frozenset()
    trained: dict[str, bool] = {}
    for name in grain.parameter_shapes(config.model):
        part = _part(name, config.model)
        is_frozen = any(re.fullmatch(pattern, name) for pattern in config.optim.frozen)
        trained[part] = trained.get(part, False) or not is_frozen
    return frozenset(part for part, trains in trained.items() if part and not trains)


def _part(name: str, model: config_lib.Model) -> str:
    """The field of PerImage that counts the products of a parameter; "" for a scalar."""
    if name in ("logit_scale", "logit_bias"):
        return ""
    if name.startswith("text"):
        return "text"
    if name.startswith("box_head/") or name.startswith("box_projection/"):
        return "decoder"
    return "image" if name.startswith("image/") or model.decoder is None else "decoder"


def _attention(tower, queries: int, keys: int) -> int:
    """Query, key, value and output projections, and the two products of queries with keys."""
    return 4 * tower.width * (tower.width * (queries + keys) + queries * keys)


def _mlp(tower, tokens: int) -> int:
    return 4 * tokens * tower.width * tower.mlp_dim


def matmul_flops(function, *arguments: Any) -> int:
    """FLOPs of one call on all devices together, counted in the jaxpr of the function with loops unrolled.

    Args:
      function: what to trace.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      NotImplementedError: matrix products in a loop that ends on a condition.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
            continue
        if name == "conv_general_dilated":
            # The kernel's input features are those of one group.
            kernel, (out, *_) = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            depth = math.prod(kernel) // kernel[out]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
            continue
        if name == "pallas_call":  # its body is one program of many: what the kernel says of itself
            total += params["cost_estimate"].flops
            continue
        if name == "while":
            if any(_count(part) for part in _jaxprs(params)):
                raise NotImplementedError("matrix products in a loop whose trips are not known")
            continue
        if name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
            continue
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "shard_map":
            # The body has one device's shapes where all mesh axes are manual, as everywhere here.
            times = params["mesh"].size
        total += times * sum(_count(part) for part in _jaxprs(params))
    return total


def _jaxprs(params: dict[str, Any]):
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if hasattr(part, "jaxpr"):  # closed
                part = part.jaxpr
            if hasattr(part, "eqns"):
                yield part
