"""Which program computes softmax(q k^T) v, by `model.attention`; the numbers are the same up to rounding.

* `xla`: products and softmax as XLA fuses them; everywhere, with any mask and dropout.
* `pallas`: a TPU kernel that keeps the scores on the core (attention_kernel.py); elsewhere interpreted.
* `cudnn`: the fused attention of cuDNN, on CUDA, in bfloat16.
* `auto`: in training, `pallas` on TPUs and `cudnn` on CUDA in bfloat16. Otherwise `xla`, and in inference.

Self-attention of the towers alone is fused. The region decoder has few queries and dropout on its weights.
"""

import functools
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from grain_jax import config as config_lib
from grain_jax.models import placement, rotary
from grain_jax.models.layers import Affine, Init, LayerNorm, dense, example_dropout, softmax, zeros


class Within(NamedTuple):
    """A mask: each position sees all of the same text."""

    # int32 [B, L], the text at each position. Padding is a text of its own, so every position sees one.
    ids: jax.Array

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


class First(NamedTuple):
    """A mask for cuDNN: all positions see the first `count`."""

    count: int


Mask: TypeAlias = Within | CausalWithin | First


def filled(length: int, program: str, multiple: int) -> int:
    """The length that a tower gives its rows, for all layers: cuDNN's backward pass takes even ones alone."""
    return -(-length // multiple) * multiple if program == "cudnn" else length


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(axes: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """An einsum whose result is float32, and whose backward pass multiplies in the type of `q`."""
    return jnp.einsum(axes, q, k, preferred_element_type=jnp.float32)


def _logits_backward(axes, kept, d):
    q, k = kept
    (of_q, of_k), out = axes.split("->")[0].split(","), axes.split("->")[1]
    d = d.astype(q.dtype)
    return jnp.einsum(f"{out},{of_k}->{of_q}", d, k), jnp.einsum(f"{out},{of_q}->{of_k}", d, q)


_logits.defvjp(lambda axes, q, k: (_logits(axes, q, k), (q, k)), _logits_backward)


class Attention(nn.Module):
    """Multi-head attention, with LayerNorm and then rotary positions on the queries and keys if asked for."""

    width: int
    heads: int
    dtype: np.dtype
    kernel_init: Init
    out_init: Init
    bias_init: Init = zeros
    qk_norm_eps: float | None = None
    dropout: float = 0.0
    program: str = "xla"  # "pallas" and "cudnn" serve self-attention without dropout
    key_bias: bool = True
    absorbs: bool = False  # whether few queries take in the maps of keys and values (`_absorbed`)
    lora: float = 0.0  # as of `layers.Dense`; not where it `absorbs`

    @nn.compact
    def __call__(
        self, query, key, value, mask=None, dropout_keys=None, site=0, rotation: rotary.Rotation | None = None
    ):
        """Attention of `query` to `key` and `value`.

        Args:
          query: [B, Lq, E].
          key: [B, Lk, E*].
          value: as `key`.
          mask: bool broadcastable to [B, K, Lq, Lk], or a `Mask` if `program` is not "xla".
          dropout_keys: see `example_dropout`.
          site: see `example_dropout`.
          rotation: rotary positions, for self-attention.

        Returns:
          [B, Lq, E].
        """
        if self.program == "pallas":
            return self._heads_side_by_side(query, mask, rotation)
        if self.absorbs and query.shape[1] * self.heads < key.shape[1]:
            return self._absorbed(query, key, value, mask, dropout_keys, site)
        heads, head_dim = self.heads, self.width // self.heads

        def project(name, x):
            if self.program == "cudnn":  # cuBLAS adds a vector inside its product, and no matrix
                x = jax.lax.optimization_barrier(x)  # XLA would join products, and copy to do so
                return self._affine(name)(x).reshape(*x.shape[:-1], heads, head_dim)
            return dense(
                (heads, head_dim),
                ("width",),
                ("heads", "head_dim"),
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                use_bias=name != "key" or self.key_bias,
                lora=self.lora,
                name=name,
            )(x)

        q = project("query", query)  # [B, Lq, K, head_dim]
        k = project("key", key)
        v = project("value", value)
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        q, k = self._normed_and_rotated(rotation, q, k)
        if self.program == "cudnn":
            out = with_cudnn(q, k, v, mask)
            return self._affine("out")(out.reshape(*out.shape[:2], -1))
        logits = _logits("bqkh,bskh->bkqs", q * head_dim**-0.5, k)
        weights = self._weights(logits, mask, dropout_keys, site)
        out = jnp.einsum("bkqs,bskh->bqkh", weights, v)
        return dense(
            self.width,
            ("heads", "head_dim"),
            ("width",),
            dtype=self.dtype,
            kernel_init=self.out_init,
            bias_init=self.bias_init,
            lora=self.lora,
            name="out",
        )(out)

    @nn.nowrap
    def _affine(self, name: str, memory_width: int = 0) -> Affine:
        """A map with the heads side by side."""
        whole = (memory_width or self.width,), ("width",)
        split = (self.heads, self.width // self.heads), ("heads", "head_dim")
        ins, outs, init = whole, split, self.kernel_init
        if name == "out":
            ins, outs, init = split, whole, self.out_init
        shape_and_axes = ins[0], outs[0], ins[1], outs[1]
        use_bias = name != "key" or self.key_bias
        return Affine(*shape_and_axes, self.dtype, init, self.bias_init, use_bias, self.lora, name=name)

    @nn.nowrap
    def _weights(self, logits, mask, dropout_keys, site: int) -> Any:
        """float32 logits -> weights [B, K, Lq, Lk]."""
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = softmax(logits, self.dtype)
        return example_dropout(weights, dropout_keys, site, self.dropout)

    @nn.nowrap
    def _absorbed(self, query, key, value, mask, dropout_keys, site: int) -> jax.Array:
        """The same with (q W) m for q (W m): no keys and values of a long memory are made.

        A bias of the keys adds the same to all logits of a query, so it has no effect, and here no gradient.
        """
        heads, head_dim, memory = self.heads, self.width // self.heads, key.shape[-1]
        q = self._affine("query")(query).reshape(*query.shape[:2], heads, head_dim)
        to_keys, _ = self._affine("key", memory).parameters()
        to_values, bias = self._affine("value", memory).parameters()
        to_keys, to_values = (x.reshape(memory, heads, head_dim) for x in (to_keys, to_values))
        q = jnp.einsum("bqkh,ekh->bkqe", q * head_dim**-0.5, to_keys)
        logits = _logits("bkqe,bse->bkqs", q, key)
        weights = self._weights(logits, mask, dropout_keys, site)
        out = jnp.einsum("bkqe,ekh->bqkh", jnp.einsum("bkqs,bse->bkqe", weights, value), to_values)
        total = weights.sum(-1, dtype=jnp.float32).astype(self.dtype)  # dropout: it is not 1
        out = out + total.swapaxes(1, 2)[..., None] * bias.reshape(heads, head_dim)
        return self._affine("out")(out.reshape(*query.shape[:2], -1))

    @nn.nowrap
    def _normed_and_rotated(self, rotation, *queries_and_keys: jax.Array) -> list[jax.Array]:
        """Queries and keys [B, L, K, head_dim] as their product takes them."""
        out = []
        for name, x in zip(("query_norm", "key_norm"), queries_and_keys, strict=True):
            if self.qk_norm_eps is not None:
                x = LayerNorm(self.qk_norm_eps, name=name)(x)
            out.append(x if rotation is None else rotary.rotate(x, rotation))
        return out

    def _heads_side_by_side(self, x: jax.Array, mask: "Mask | None", rotation) -> jax.Array:
        """Self-attention by the kernel: the same parameters, the heads side by side in [B, L, E].

        A head has fewer than the 128 lanes of a TPU register: as its own axis it would be padded to them.
        """
        from grain_jax.models import attention_kernel  # a fifth of a second to import

        heads, head_dim = self.heads, self.width // self.heads
        maps = [self._affine(name) for name in ("query", "key", "value")]
        together = attention_kernel.arranges(heads, head_dim) and not self.lora
        if together:  # one product reads x once
            kernel, bias = (
                attention_kernel.arranged(q, k, v, heads)
                for q, k, v in zip(*(layer.parameters() for layer in maps))
            )
            qkv = [maps[0].product(x, kernel, bias)]
        else:
            qkv = [layer(x) for layer in maps]
        qkv = [checkpoint_name(y, "qkv") for y in qkv]
        norms, eps = None, self.qk_norm_eps
        if rotation is not None:  # it follows the norm, which is inside the kernel without it
            q, k, v = attention_kernel.apart(qkv[0], heads) if together else qkv
            q, k = (y.reshape(*x.shape[:2], heads, head_dim) for y in (q, k))
            q, k = (y.reshape(x.shape) for y in self._normed_and_rotated(rotation, q, k))
            qkv, eps = [q, k, v], None
        elif eps is not None:
            norms = tuple(
                part
                for name in ("query_norm", "key_norm")
                for part in LayerNorm(eps, name=name).parameters(head_dim)
            )
        out = with_pallas(*qkv, heads=heads, norms=norms, eps=eps, within=mask)
        return self._affine("out")(out)


def with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, within: Mask | None) -> jax.Array:
    """Attention by cuDNN.

    Its backward pass takes even lengths alone, so towers have `filled` rows.

    Args:
      q, k, v: [B, L, heads, width], bfloat16.
      within: the mask; None: all positions see all.

    Returns:
      [B, L, heads, width].
    """
    heads, first = q.shape[2], None
    if isinstance(within, First):
        within, first = None, within.count

    def attend(q, k, v, *of_mask):
        seen = {}
        if within is not None:
            seen["mask"] = within._replace(ids=of_mask[0]).mask()
        elif first is not None:
            seen["key_value_seq_lengths"] = jnp.full(len(q), first, jnp.int32)
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **seen)

    of_mask = () if within is None else tuple(within)
    # JAX does not make sure that a mask is cut as the queries are.
    mesh, batch = placement.mesh(), placement.batch_axes()
    tensor = 1 if mesh is None else mesh.shape.get("tensor", 1)
    both = PartitionSpec(batch, None, "tensor" if tensor > 1 and heads % tensor == 0 else None)
    specs = (both, both, both, *[PartitionSpec(batch)] * len(of_mask))
    return placement.on_each_device(attend, mesh, specs, both)(q, k, v, *of_mask)


def with_pallas(*given: jax.Array, within: Mask | None, **options) -> jax.Array:
    """Attention by the kernel; what is `given` and `options` as of `attention_kernel.attend`."""
    from grain_jax.models import attention_kernel  # a fifth of a second to import

    masks = {}
    if isinstance(within, (Within, CausalWithin)):
        masks = dict(ids=within.ids, causal=isinstance(within, CausalWithin))
    return attention_kernel.attend(*given, **masks, **options)
