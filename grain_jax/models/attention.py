"""Which program computes softmax(q k^T) v, by `model.attention`; the numbers are the same up to rounding.

`xla`     products and softmax as XLA fuses them: everywhere, with any mask and dropout
`pallas`  a TPU kernel that keeps the scores on the core (attention_kernel.py); elsewhere in its interpreter, for tests
`cudnn`   the fused attention of cuDNN, on CUDA, in bfloat16
`auto`    in training, `pallas` on TPUs and `cudnn` on CUDA in bfloat16; `xla` on other platforms, without a mesh
          (inference), and where a kernel does not serve

Self-attention of the towers alone is fused. The region decoder has few queries and dropout on its weights.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from grain_jax import config as config_lib
from grain_jax.models import placement


class Within(NamedTuple):
    """A mask: each position sees all of the same text."""

    ids: jax.Array  # int32 [B, L], the text at each position. Padding is a text of its own, so every position sees one

    def mask(self) -> jax.Array:
        """The same as bool [B, 1, L, L]."""
        return (self.ids[:, :, None] == self.ids[:, None, :])[:, None]


class CausalWithin(NamedTuple):
    """A mask: each position sees itself and earlier ones of the same text."""

    ids: jax.Array  # int32 [B, L], as of `Within`

    def mask(self) -> jax.Array:
        """The same as bool [B, 1, L, L]."""
        length = self.ids.shape[-1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        return (causal & (self.ids[:, :, None] == self.ids[:, None, :]))[:, None]


Mask: TypeAlias = Within | CausalWithin


def choose(attention: str, dtype: np.dtype, heads: int) -> str:
    """The program for the self-attention of a tower: "xla", "pallas" or "cudnn".

    Args:
      attention: `model.attention`.
      dtype: of the activations.
      heads: of the tower; a tensor axis that does not divide them leaves them to XLA.
    """
    mesh = placement.mesh()
    if attention != "auto":
        return attention
    if mesh is None or heads % mesh.shape.get("tensor", 1):
        return "xla"
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return "pallas"
    # cuDNN has no float32 attention.
    return "cudnn" if platform in ("gpu", "cuda") and dtype == jnp.bfloat16 else "xla"


def of_towers(model: config_lib.Model, dtype: str) -> str:
    """The programs of both towers in words, on the mesh of `placement`."""
    towers = (("image", model.image), ("text", model.text))
    chosen = {n: choose(model.attention, jnp.dtype(dtype), t.heads) for n, t in towers}
    if len(set(chosen.values())) == 1:
        return chosen["image"]
    return ", ".join(f"{program} ({tower} tower)" for tower, program in chosen.items())


def with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, within: Mask | None) -> jax.Array:
    """Attention by cuDNN.

    Its backward pass takes even lengths alone, so an odd one grows by a position that no other sees.

    Args:
      q, k, v: [B, L, heads, width], bfloat16.
      within: the mask; None: all positions see all.

    Returns:
      [B, L, heads, width].
    """
    length, heads = q.shape[1:3]
    odd = length % 2
    if odd:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        if within is not None:  # a text of its own
            ids = jnp.pad(within.ids, ((0, 0), (0, 1)), constant_values=-1)
            within = within._replace(ids=ids)

    def attend(q, k, v, *of_mask):
        seen = {}
        if within is not None:
            seen["mask"] = within._replace(ids=of_mask[0]).mask()
        elif odd:
            seen["key_value_seq_lengths"] = jnp.full(len(q), length, jnp.int32)
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **seen)

    of_mask = () if within is None else tuple(within)
    mesh = placement.mesh()
    if mesh is not None:  # JAX does not make sure that a mask is cut as the queries are
        batch, tensor = placement.batch_axes(), mesh.shape.get("tensor", 1)
        both = PartitionSpec(batch, None, "tensor" if tensor > 1 and heads % tensor == 0 else None)
        specs = (both, both, both, *[PartitionSpec(batch)] * len(of_mask))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=both, check_vma=False)
    return attend(q, k, v, *of_mask)[:, :length]


def with_pallas(*given: jax.Array, within: Mask | None, **options) -> jax.Array:
    """Attention by the kernel; what is `given` and `options` as of `attention_kernel.attend`."""
    from grain_jax.models import attention_kernel  # a fifth of a second to import

    masks = {}
    if within is not None:
        masks = dict(ids=within.ids, causal=isinstance(within, CausalWithin))
    return attention_kernel.attend(*given, **masks, **options)
