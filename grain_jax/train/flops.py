"""Floating-point operations: of a JAX function, of the model per image, and the peak of a chip.

Matrix products and convolutions alone are counted, a multiply-add as two. Element-wise work is left out, as
is usual for model FLOPs, so no number depends on the backend.
"""

import collections
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.config import Config
from grain_jax.models import grain
from grain_jax.train import forward as forward_lib
from grain_jax.train import sharding

# Dense bfloat16 FLOPs per second by `jax.Device.device_kind`, from the data sheets of the vendors. A device
# is a chip; on TPU7x it is half a chip.
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
    "NVIDIA GB200": 2500e12,
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


class FlopsPerImage(NamedTuple):
    """FLOPs of a forward pass per image."""

    image: float  # the image tower
    text: float  # the text tower over the rows per image, and the projection of its texts
    decoder: float  # the region decoder, its projections and boxes, and the box head
    losses: float  # similarities
    terms: float = 0.0  # local loss terms, with what they ask of the towers
    frozen: frozenset[str] = frozenset()  # which of the first three have no trained parameter
    # With factors of LoRA or local terms: forward and backward pass of all but the losses, counted in both.
    counted: float | None = None

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass."""
        return self.image + self.text + self.decoder + self.losses + self.terms

    @property
    def train(self) -> float:
        """FLOPs of forward and backward pass without recomputation: a product has two in its backward pass.

        What a local term computes again by its own is counted.

        A frozen part has none, except a decoder on a trained image tower: it has one, for the gradient of its
        input. A part that is frozen in parts counts as trained, except with LoRA: then a frozen matrix has no
        product for its gradient.
        """
        if self.counted is not None:
            return self.counted + 3 * self.losses
        backward = 2 * self.forward
        for part in self.frozen:
            through = part == "decoder" and "image" not in self.frozen
            backward -= getattr(self, part) * (1 if through else 2)
        return self.forward + backward


def per_image(config: Config) -> FlopsPerImage:
    """FLOPs of the model per image of a batch, counted in the jaxpr of its forward pass (with LoRA or local
    terms, of the backward pass too).

    Attention counts masked pairs, and rows count their padding: both are computed. Those of the losses are a
    closed formula, without `loss.terms` and the sums of `loss.hard_negative`, which are no matrix products.
    """
    # A kernel would be counted as what it says of itself.
    model = dataclasses.replace(config.model, attention="xla")
    batch = forward_lib.abstract_batch(config)
    parts: dict[str, float] = dict.fromkeys(("image", "text", "decoder", "terms"), 0.0)
    forward = forward_lib.Forward(dataclasses.replace(config, model=model, remat="none"))
    params = sharding.unbox(jax.eval_shape(forward.init))
    apply = lambda params, batch: forward(params, batch)

    for name, count in by_module(jax.make_jaxpr(apply)(params, batch).jaxpr).items():
        parts[_field(name, model)] += count / config.batch_size
    counted = None
    if config.optim.lora.rank or forward.terms:
        total = lambda *given: sum(x.sum() for x in jax.tree.leaves(apply(*given)))
        both = by_module(jax.make_jaxpr(jax.value_and_grad(total))(params, batch).jaxpr)
        counted = both.total() / config.batch_size
    return FlopsPerImage(**parts, losses=of_losses(config), frozen=_frozen(config), counted=counted)


def of_losses(config: Config) -> int:
    """FLOPs of the similarities of the losses per image, forward: `FlopsPerImage.losses`."""
    if losses.TERMS.keys().isdisjoint(term.name for term, _ in losses.terms_of(config.loss)):
        return 0  # local terms alone
    regions, group = config.input.max_regions, config.loss.group_size or config.batch_size
    pairs = config.input.captions_per_image * config.batch_size + regions * (group * regions)
    if config.loss.image_description:
        pairs += regions * config.batch_size
    if config.loss.box_description:
        pairs += regions * (group * regions)
    if config.loss.match_description and config.model.decoder is not None:
        pairs += config.model.decoder.queries * regions
    return 2 * pairs * config.model.embed_dim


def _frozen(config: Config) -> frozenset[str]:
    """The parts of image, text and decoder of which `optim.frozen` matches every parameter."""
    if not config.optim.frozen:
        return frozenset()
    trained: dict[str, bool] = {}
    for name in grain.parameter_shapes(config.model):
        part = _field(name, config.model)
        is_frozen = any(re.fullmatch(pattern, name) for pattern in config.optim.frozen)
        trained[part] = trained.get(part, False) or not is_frozen
    return frozenset(part for part, trains in trained.items() if part and not trains)


def _field(name: str, model: config_lib.Model) -> str:
    """The field of FlopsPerImage that counts the products of a parameter or a module; "" for a scalar."""
    if name == forward_lib.TERMS:
        return "terms"
    part = model.part(name)
    return {"scale": "", "boxes": "decoder"}.get(part, part)


def by_module(jaxpr, scope: str = "") -> collections.Counter[str]:
    """FLOPs of a jaxpr, on all devices together, by the module of GRAIN that they are named after; "": none.

    The names of Flax are scopes: GRAIN/GRAIN.image_tokens/image/blocks/attention/query.

    Raises:
      NotImplementedError: matrix products in a loop that ends on a condition.
    """
    total: collections.Counter[str] = collections.Counter()
    for equation in jaxpr.eqns:
        within = f"{scope}/{equation.source_info.name_stack}"
        module = next((x for x in within.split("/") if x and not x.startswith("GRAIN")), "")
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (x.aval.shape for x in equation.invars)
            if name == "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                depth = math.prod(left[axis] for axis in contracted)
            else:  # the kernel has the input features of one group
                depth = math.prod(right) // right[params["dimension_numbers"].rhs_spec[0]]
            total[module] += 2 * math.prod(equation.outvars[0].aval.shape) * depth
            continue
        if name == "pallas_call":  # its body is one program of many: what the kernel says of itself
            total[module] += params["cost_estimate"].flops
            continue
        if name == "while":
            if any(by_module(part) for part in jaxprs(params)):
                raise NotImplementedError("matrix products in a loop whose trips are not known")
            continue
        if name == "cond":
            branches = (by_module(branch.jaxpr, within) for branch in params["branches"])
            total += max(branches, key=lambda counts: counts.total())
            continue
        times = params["length"] if name == "scan" else 1
        if name == "shard_map":  # the body has one device's shapes, because all mesh axes are manual
            times = params["mesh"].size
        for part in jaxprs(params):
            for key, count in by_module(part, within).items():
                total[key] += times * count
    return total


def jaxprs(params: dict[str, Any]):
    """The jaxprs among the parameters of an equation: bodies of loops, branches and calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if hasattr(part, "jaxpr"):  # closed
                part = part.jaxpr
            if hasattr(part, "eqns"):
                yield part
