"""What self_distillation and masked_patches share: the head of DINO, and the cross-entropy of its distributions.

A head maps a vector to a bottleneck of unit length, and compares that with K prototypes of unit length (Caron et al.
2021, arXiv 2104.14294). The teacher's distribution over the prototypes is centred and sharpened, p; the student learns
it:

    p = softmax((z_teacher - c) / temperature_teacher)        loss = - sum_k p_k log softmax(z_student / temperature)_k

One row of logits has K float32 numbers, 262 kB for 65,536 prototypes. So they are computed `tile` rows at a time, and
again in the backward pass: a device holds a few arrays of tile x K, whatever the batch.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grain_jax.config import fields
from grain_jax.losses import streaming
from grain_jax.losses.local import PerImage
from grain_jax.models import layers, placement
from grain_jax.models.grain import normalize


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys that the terms with prototypes share; the defaults are those of DINO."""

    prototypes: int = fields.count(65536, low=2, high=2**20)  # K; a small model wants fewer
    head_layers: int = fields.count(3, low=1, high=16)  # linear maps before the prototypes
    hidden: int = fields.size(2048)  # units between them
    bottleneck: int = fields.size(256)  # numbers that the prototypes are compared with
    student_temperature: float = fields.key(0.1, low=0.01)  # of the student
    first_temperature: float = fields.key(
        0.04, low=0.01
    )  # of the teacher, in the term's first step
    teacher_temperature: float = fields.key(0.07, low=0.01)  # of the teacher, after the warm-up
    warm_up: float = fields.key(
        0.3, low=0, high=1
    )  # share of the term's steps, from the first to the other
    momentum: float = fields.key(0.9, low=0, high=1)  # of the running centre
    tile: int = fields.count(1024, low=1)  # rows of logits in memory at once on a device

    def temperature(self, share: jax.Array) -> jax.Array:
        """The teacher's temperature at this share of the term's steps: linear, then constant."""
        done = jnp.float32(1) if self.warm_up == 0 else jnp.minimum(share / self.warm_up, 1)
        return self.first_temperature + done * (self.teacher_temperature - self.first_temperature)


class Products(NamedTuple):
    """How logits are multiplied; their sums are float32."""

    dtype: str  # of the operands
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST  # of those of float32

    def of(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """The product of an equation of einsum, float32."""
        return jnp.einsum(
            equation,
            a.astype(self.dtype),
            b.astype(self.dtype),
            precision=self.precision if self.dtype == "float32" else None,
            preferred_element_type=jnp.float32,
        )


class Embedded(NamedTuple):
    """What a head gives; both of unit length, float32."""

    rows: jax.Array  # float32 [..., d], bottlenecks
    prototypes: jax.Array  # float32 [K, d]


class Head(nn.Module):
    """The projection head of DINO: linear maps with GELU between, unit length, prototypes.

    The prototypes are a weight-normalised last layer whose gains stay 1 (Salimans and Kingma 2016).
    """

    options: Options
    dtype: str  # of activations

    @nn.compact
    def __call__(self, x: jax.Array) -> Embedded:
        """[..., E] -> rows [..., d] and prototypes [K, d]."""
        o, dtype = self.options, jnp.dtype(self.dtype)
        # At 2048 units 0.022, as DINO's 0.02; with that in a small head biases would soon hide what it reads.
        init = lambda: layers.normal(x.shape[-1] ** -0.5)
        # In turns, as the MLP of a layer: a map to the axis of `tensor`, then one from it.
        axis, other = "width", "mlp"
        for i in range(o.head_layers - 1):
            x = layers.dense(
                *(o.hidden, (axis,), (other,)), dtype=dtype, kernel_init=init(), name=f"hidden_{i}"
            )(x)
            x = layers.ACTIVATIONS["gelu"](x)
            x = placement.by_batch(x) if other == "width" else x
            axis, other = other, axis
        x = layers.dense(
            *(o.bottleneck, (axis,), ("embed",)), dtype=dtype, kernel_init=init(), name="bottleneck"
        )(x)
        rows = layers.parameter(
            *(self, "prototypes", layers.normal(o.bottleneck**-0.5)),
            *(("vocab", "width"), (o.prototypes, o.bottleneck)),
        )
        return Embedded(normalize(x), normalize(rows))


def of_teacher(head: Head, params: Mapping | None, x: jax.Array) -> Embedded:
    """The teacher's head on x [..., E], without a gradient.

    Args:
      head: the student's.
      params: the teacher's parameters of the term, with those of the head below "head"; None or {}: the student's.
      x: what the head reads.
    """
    if not params:
        return jax.lax.stop_gradient(head(x))
    alone = Head(head.options, head.dtype, parent=None)
    found = cast(Embedded, alone.apply({"params": params["head"]}, x))
    return jax.lax.stop_gradient(found)


class Compared(NamedTuple):
    """Sums over the rows of an image, by their weights; `usage` over all images, and without a gradient."""

    loss: jax.Array  # float32 [B], cross-entropy
    entropy: jax.Array  # float32 [B], of the teacher's distributions
    usage: jax.Array  # float32 [K], the teacher's distributions


def compare(
    options: Options,
    products: Products,
    student: Embedded,
    teacher: Embedded,
    weight: jax.Array,
    centre: jax.Array,
    temperature: jax.Array,
) -> Compared:
    """The cross-entropy of the student's distributions with the teacher's.

    Each device computes its own images (models/placement.py says which), so that the gradient of the prototypes is
    summed over devices once, not once a tile.

    Args:
      options: of the term.
      products: those of the logits.
      student: rows [B, n, d].
      teacher: rows [B, n, d].
      weight: float32 [B, n], of each row; 0 leaves it out.
      centre: float32 [K], c, subtracted from the teacher's logits.
      temperature: float32 [], of the teacher.
    """
    arguments = *student, *teacher, weight, centre, temperature
    mesh, axes = placement.mesh(), placement.batch_axes()
    if mesh is None:
        return compare_here(options, products, *arguments)

    def of_device(*arguments) -> Compared:
        found = compare_here(options, products, *arguments)
        return found._replace(usage=jax.lax.psum(found.usage, axes))

    cut: Any = PartitionSpec(axes)
    whole: Any = PartitionSpec()
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(cut, whole, cut, whole, cut, whole, whole),
        out_specs=Compared(cut, cut, whole),
        check_vma=False,
    )(*arguments)


def compare_here(
    options: Options,
    products: Products,
    rows,
    prototypes,
    of_teacher,
    its,
    weight,
    centre,
    temperature,
) -> Compared:
    """`compare` of the images of one device; prototypes `rows` x `prototypes` and `of_teacher` x `its`."""
    images, n, _ = rows.shape
    of_teacher, its, centre = jax.lax.stop_gradient((of_teacher, its, centre))
    flat = lambda x: x.reshape(images * n, *x.shape[2:])
    tiles = streaming.cut((flat(rows), flat(of_teacher), flat(weight)), options.tile)

    @jax.checkpoint
    def one_tile(usage, part):
        rows, of_teacher, weight = part
        target = (_logits(of_teacher, its, products) - centre) / temperature
        log_p = jax.nn.log_softmax(target)
        p = jnp.exp(log_p)
        z = _logits(rows, prototypes, products) / options.student_temperature
        loss = jax.nn.logsumexp(z, axis=-1) - jnp.sum(p * z, axis=-1)
        entropy = -jnp.sum(p * log_p, axis=-1)
        return usage + jax.lax.stop_gradient(weight @ p), (loss * weight, entropy * weight)

    usage, found = jax.lax.scan(one_tile, jnp.zeros(len(its)), tiles)
    per_image = lambda x: x.reshape(-1)[: images * n].reshape(images, n).sum(1)
    loss, entropy = map(per_image, found)
    return Compared(loss, jax.lax.stop_gradient(entropy), usage)


def sinkhorn_centre(
    teacher: Embedded,
    temperature: jax.Array,
    *,
    iterations: int,
    names: tuple[str, ...],
    products: Products,
    tile: int,
) -> jax.Array:
    """The centre with which `compare` has the assignments of Sinkhorn-Knopp (Cuturi 2013; Caron et al. 2020).

    An iteration scales exp(z / temperature) so that all prototypes have equal sums over the rows of all devices, then
    so that each row sums to 1. The last scaling of rows is the softmax of `compare`; those of the prototypes are a
    centre. In logarithms, so that nothing overflows.

    Args:
      teacher: rows [n, d] of this device.
      temperature: float32 [], of the teacher.
      iterations: 1 or more; papers have 3.
      names: the mesh axes with the other rows; () on one device.
      products: as of `compare`.
      tile: rows of logits in memory at once.

    Returns:
      float32 [K].
    """
    rows, prototypes = jax.lax.stop_gradient(teacher)
    tiles = streaming.cut((rows, jnp.ones(len(rows))), tile)

    def log_sums(scale):
        """Of each prototype the logarithm of its sum over all rows, after the rows are scaled to 1 under `scale`."""

        def one_tile(sums, part):
            rows, real = part
            z = _logits(rows, prototypes, products) / temperature
            if scale is not None:
                z = z - jax.nn.logsumexp(z + scale, axis=-1, keepdims=True)
            z = jnp.where(real[:, None] > 0, z, -jnp.inf)
            highest, total = sums
            higher = jnp.maximum(highest, z.max(0))
            total = total * jnp.exp(highest - higher) + jnp.exp(z - higher).sum(0)
            return (higher, total), None

        nothing = jnp.full(len(prototypes), jnp.finfo(jnp.float32).min), jnp.zeros(len(prototypes))
        (highest, total), _ = jax.lax.scan(one_tile, nothing, tiles)
        if names:
            most = jax.lax.pmax(highest, names)
            total = jax.lax.psum(total * jnp.exp(highest - most), names)
            highest = most
        return highest + jnp.log(total)

    scale = -log_sums(None)
    for _ in range(iterations - 1):
        scale = -log_sums(scale)
    return -temperature * scale


def sum_of_logits(teacher: Embedded, weight: jax.Array) -> jax.Array:
    """The sum of the teacher's logits over its rows [B, n, d], by their weights [B, n]; float32 [K]."""
    rows, prototypes = jax.lax.stop_gradient(teacher)
    total = jnp.sum(rows * weight[..., None], axis=(0, 1))
    return _logits(total[None], prototypes, Products("float32"))[0]


def initial_state(options: Options) -> dict[str, jax.Array]:
    """The centre, and the running mean of the teacher's distributions, [K] each."""
    k = options.prototypes
    return {"centre": jnp.zeros(k), "usage": jnp.full(k, 1 / k)}


def statistics(teacher: Embedded, weight: jax.Array, found: Compared) -> dict[str, jax.Array]:
    """The sums that `update` takes; the weights [B, n] of an image sum to 1, or 0 where it has no part."""
    return {
        "logits": sum_of_logits(teacher, weight),
        "usage": found.usage,
        "images": jnp.sum(weight.sum(1) > 0).astype(jnp.float32),
    }


def update(
    options: Options, state: Mapping[str, jax.Array], statistics: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Both running means after a step: momentum x old + (1 - momentum) x that of the batch."""
    images, kept = statistics["images"], options.momentum

    def mean(old, total):
        return jnp.where(images > 0, kept * old + (1 - kept) * total / jnp.maximum(images, 1), old)

    return {
        "centre": mean(state["centre"], statistics["logits"]),
        "usage": mean(state["usage"], statistics["usage"]),
    }


def measures(found: Compared, usage: jax.Array, count: jax.Array) -> dict[str, PerImage]:
    """What shows a collapse: KL and entropies, these as shares of log K.

    `entropy` is that of the teacher's mean distribution, `usage` [K]: 1 = it uses all prototypes alike, 0 = one alone.
    `entropy_of_one` is the mean of those of single distributions: 1 = each is uniform.
    """
    most = math.log(len(usage))
    return {
        "kl": PerImage(found.loss - found.entropy, count),
        "entropy": PerImage(count * entropy_of(usage), count),
        "entropy_of_one": PerImage(found.entropy / most, count),
    }


def entropy_of(distribution: jax.Array) -> jax.Array:
    """The entropy of a distribution, float32 [K], as a share of log K."""
    return jax.scipy.special.entr(distribution).sum() / math.log(len(distribution))


def _logits(rows: jax.Array, prototypes: jax.Array, products: Products) -> jax.Array:
    """Rows [n, d] and prototypes [K, d] -> float32 [n, K]; the products of the gradient are of `products`, too."""
    return cast(jax.Array, _product(rows, prototypes, products))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(rows, prototypes, products):
    return products.of("nd,kd->nk", rows, prototypes)


def _product_forward(rows, prototypes, products):
    return _product(rows, prototypes, products), (rows, prototypes)


def _product_backward(products, operands, cotangent):
    rows, prototypes = operands
    of_rows = products.of("nk,kd->nd", cotangent, prototypes)
    of_prototypes = products.of("nk,nd->kd", cotangent, rows)
    return of_rows.astype(rows.dtype), of_prototypes.astype(prototypes.dtype)


_product.defvjp(_product_forward, _product_backward)
