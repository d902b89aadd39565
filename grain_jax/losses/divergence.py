"""How far a student's similarities of rows and columns are from a teacher's, in memory that does not grow with devices.

Each row has two distributions over the columns of all devices, the softmax of the student's and that of the teacher's
scaled similarities, and so has each column over the rows. Columns travel round the ring with both of their embeddings
and with the running sums of their softmaxes, as in `streaming.negatives_of_both`; tiles of similarities are computed
again in the backward pass. No gradient goes to the teacher. All of this runs inside `jax.shard_map`.

With m rows and k columns of D and Dt values on each of n devices, a device holds about (m + k) (2 D + Dt) + a few tile^2
numbers, and sends n k (3 D + 2 Dt) numbers.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grain_jax.losses import streaming
from grain_jax.losses.ring import Ring, TravellingBlock, stream_and_return
from grain_jax.losses.streaming import MASKED, IdSet


class Side(NamedTuple):
    """Rows, or columns, as the student and the teacher embed them.

    A row and a column that share an id are left out of each other's distribution, unless they have one owner.
    """

    student: Float[Array, "m D"]
    teacher: Float[Array, "m Dt"]
    id: Int[Array, "m"] | IdSet
    owner: Int[Array, "m"]  # such as the number of the image in the global batch
    real: Bool[Array, "m"]  # False: padding, in no distribution


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def divergences(
    tile: int,
    ring: Ring,
    rows: Side,
    columns: Side,
    scale: Float[Array, ""],
    teacher_scale: Float[Array, ""],
) -> tuple[Float[Array, "m"], Float[Array, "k"]]:
    """KL(teacher || student) of each row over the columns of the ring, and of each column over its rows.

    With student logits z = scale * row . column and the teacher's w that of a row is sum(p (w - z)) + logsumexp(z) -
    logsumexp(w), p = softmax(w); its derivative by z is softmax(z) - p. It is 0 where there is nothing to compare with.
    The columns travel: let them be the smaller side.

    Args:
      tile: largest number of rows, and of columns, whose similarities are in memory at once.
      ring: the devices with the other columns and rows; outside of `jax.shard_map`, the default.
      rows: those on this device.
      columns: those on this device.
      scale: factor of the student's similarities.
      teacher_scale: factor of the teacher's similarities.
    """
    return _forward(tile, ring, rows, columns, scale, teacher_scale)[0]


def _forward(tile, ring, rows, columns, scale, teacher_scale):
    row_tiles = streaming.cut(rows, tile)
    logits_of = functools.partial(
        _logits, scale=scale, teacher_scale=teacher_scale, precision=ring.precision
    )

    def visit(row_sums, block):
        """Adds a block to the sums of the rows; the sums of its columns over these rows, [k, 5]."""
        column_tiles, _ = _read(block, columns, tile)

        def one_tile(row_sums, columns):
            def one_row_tile(column_sum, part):
                rows, row_sum = part
                z, w = logits_of(rows, columns)
                return _add_logits(column_sum, z.T, w.T), _add_logits(row_sum, z, w)

            nothing = _no_logits(columns.owner.shape)
            column_sum, row_sums = jax.lax.scan(one_row_tile, nothing, (row_tiles, row_sums))
            return row_sums, column_sum

        row_sums, found = jax.lax.scan(one_tile, row_sums, column_tiles)
        return row_sums, found.reshape(-1, 5)[: len(block.vectors)]

    row_sums, column_sums = stream_and_return(
        ring,
        _block(columns),
        visit,
        _add_sums,
        _no_logits(row_tiles.owner.shape),
        _no_logits(columns.owner.shape),
    )
    if ring.gather is not None:
        column_sums = _joined(column_sums, ring.gather, len(columns.owner))
    row_sums = row_sums.reshape(-1, 5)[: len(rows.owner)]
    of_rows, of_columns = _divergence(row_sums), _divergence(column_sums)
    residuals = rows, columns, scale, teacher_scale, _lse(row_sums), _lse(column_sums)
    return (of_rows, of_columns), residuals


def _backward(tile, ring, residuals, cotangents):
    rows, columns, scale, teacher_scale, row_lse, column_lse = residuals
    row_tiles, *of_row_tiles = streaming.cut((rows, row_lse, cotangents[0]), tile)
    logits_of = functools.partial(
        _logits, scale=scale, teacher_scale=teacher_scale, precision=ring.precision
    )
    product = functools.partial(streaming.product, precision=ring.precision)

    def visit(row_gradients, block):
        """Adds the gradients from a block to those of the rows; those of its columns, [k, D]; without the scale."""
        column_tiles, numbers = _read(block, columns, tile)
        numbers = jax.lax.bitcast_convert_type(numbers, jnp.float32)

        def one_tile(row_gradients, part):
            columns, numbers = part
            lse, cotangent = numbers[:, :2], numbers[:, 2]

            def one_row_tile(column_gradient, part):
                rows, row_lse, row_cotangent, row_gradient = part
                z, w = logits_of(rows, columns)
                of_row = jnp.exp(z - row_lse[:, :1]) - jnp.exp(w - row_lse[:, 1:])
                of_column = jnp.exp(z - lse[:, 0]) - jnp.exp(w - lse[:, 1])
                share = row_cotangent[:, None] * of_row + cotangent * of_column
                share = jnp.where(z > MASKED, share, 0)  # [rows, columns]
                row_gradient += product("nm,md->nd", share, columns.student)
                column_gradient += product("nm,nd->md", share, rows.student)
                return column_gradient, row_gradient

            column_gradient, row_gradients = jax.lax.scan(
                one_row_tile,
                jnp.zeros_like(columns.student),
                (row_tiles, *of_row_tiles, row_gradients),
            )
            return row_gradients, column_gradient

        row_gradients, found = jax.lax.scan(one_tile, row_gradients, (column_tiles, numbers))
        return row_gradients, found.reshape(-1, found.shape[-1])[: len(block.vectors)]

    numbers = jnp.concatenate([column_lse, cotangents[1][:, None]], axis=-1)
    row_gradients, column_gradients = stream_and_return(
        ring,
        _block(columns, jax.lax.bitcast_convert_type(numbers.T, jnp.int32)),
        visit,
        operator.add,
        jnp.zeros_like(row_tiles.student),
        jnp.zeros_like(columns.student),
    )
    if ring.gather is not None:
        column_gradients = jax.lax.psum_scatter(column_gradients, ring.gather, tiled=True)
    row_gradients = row_gradients.reshape(-1, rows.student.shape[-1])[: len(rows.owner)]
    return (
        Side._make((scale * row_gradients, *(None,) * 4)),
        Side._make((scale * column_gradients, *(None,) * 4)),
        jnp.sum(rows.student * row_gradients),
        None,
    )


divergences.defvjp(_forward, _backward)


def _block(columns: Side, *numbers: Array) -> TravellingBlock:
    """The columns as they travel, with numbers int32 [n, k] behind their labels."""
    own = columns.owner[None], columns.real[None].astype(jnp.int32)
    return TravellingBlock(
        jnp.concatenate([columns.student, columns.teacher], axis=-1),
        jnp.concatenate([streaming.label_rows(columns.id), *own, *numbers]),
    )


def _read(block: TravellingBlock, form: Side, tile: int):
    """(tiles of the columns of a block, in the form of others; their further numbers, [tiles, k, n])."""
    vectors, labels = streaming.cut((block.vectors, block.labels.T), tile)
    student, teacher = jnp.split(vectors, [form.student.shape[-1]], axis=-1)
    ids, numbers = streaming.read_ids(labels, form.id)
    owner, real = numbers[..., 0], numbers[..., 1] > 0  # padding is not real
    return Side(student, teacher, ids, owner, real), numbers[..., 2:]


def _logits(rows: Side, columns: Side, *, scale, teacher_scale, precision):
    """Of the student and of the teacher, [m, k] each; MASKED where a row and a column are not compared."""
    allowed = rows.real[:, None] & columns.real
    allowed &= (rows.owner[:, None] == columns.owner) | ~streaming.share_an_id(rows.id, columns.id)
    z, w = (
        factor * streaming.product("nd,md->nm", x, y, precision)
        for factor, x, y in (
            (scale, rows.student, columns.student),
            (teacher_scale, rows.teacher, columns.teacher),
        )
    )
    return jnp.where(allowed, z, MASKED), jnp.where(allowed, w, MASKED)


# Running sums, [..., 5]: the largest z, the sum of exp(z - largest); the largest w, and the sums of e = exp(w - largest)
# and of e (w - z).
def _no_logits(shape):
    low, zero = jnp.full(shape, MASKED), jnp.zeros(shape)
    return jnp.stack([low, zero, low, zero, zero], axis=-1)


def _add_logits(sums, z, w):
    """Running sums [m, 5] with logits [m, k] added."""
    allowed = z > MASKED
    highest, teacher_highest = z.max(1), w.max(1)
    share = jnp.where(allowed, jnp.exp(z - highest[:, None]), 0)
    teacher = jnp.where(allowed, jnp.exp(w - teacher_highest[:, None]), 0)
    more = highest, share.sum(1), teacher_highest, teacher.sum(1), (teacher * (w - z)).sum(1)
    return _add_sums(sums, jnp.stack(more, axis=-1))


def _add_sums(a, b):
    """Running sums [m, 5] of both."""
    highest = jnp.maximum(a, b)[:, 0:3:2]
    return (_below(a, highest) + _below(b, highest)).at[:, 0:3:2].set(highest)


def _below(sums, highest):
    """Running sums [m, 5] that are divided by exp of other largest logits, [m, 2]."""
    fade = jnp.exp(sums[:, 0:3:2] - highest)
    return sums * fade[:, np.array([0, 0, 1, 1, 1])]


def _joined(sums, axis: str, count: int):
    """Running sums of g blocks over the rows of all devices along an axis, and of these those of this device's block."""
    highest = jax.lax.pmax(sums[:, 0:3:2], axis)
    sums = jax.lax.psum(_below(sums, highest), axis).at[:, 0:3:2].set(highest)
    return jax.lax.dynamic_slice_in_dim(sums, jax.lax.axis_index(axis) * count, count)


def _lse(sums):
    """The logarithms of the sums of exp(z) and of exp(w), [m, 2]."""
    return sums[:, 0:3:2] + jnp.log(jnp.maximum(sums[:, 1:4:2], jnp.finfo(jnp.float32).tiny))


def _divergence(sums):
    total, cross = sums[:, 3], sums[:, 4]
    some = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    student, teacher = _lse(sums).T
    return jnp.where(total > 0, cross / some + student - teacher, 0)
