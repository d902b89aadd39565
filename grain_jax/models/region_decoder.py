"""Region decoder: learned queries attend to the image tokens; the last one may stand for the whole image.

docs/method.md, Model; the layer is DETR's pre-norm one (Carion et al. 2020), without positions on the memory.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import RegionDecoder
from grain_jax.core import schema
from grain_jax.models import attention, layers, placement

xavier = nn.initializers.xavier_uniform()


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, ReLU MLP."""

    tower: RegionDecoder
    dtype: np.dtype

    @nn.compact
    def __call__(self, content, layer, memory, mask, query_embed, dropout_keys):
        """content [B, Q+1, E], layer [], memory [B, N, E], mask, query_embed [Q+1, E] -> content, twice."""
        t = self.tower
        keys = dropout_keys
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, layer)
        norm = lambda name: layers.LayerNorm(t.norm_eps, name=name)
        drop = lambda x, site: layers.example_dropout(x, keys, site, t.dropout)
        # In the reference query, key and value are one [3E, E] matrix: this is its xavier for each [E, E].
        qkv_init = nn.initializers.variance_scaling(0.5 * t.qkv_init_gain**2, "fan_in", "uniform")
        attend = lambda name, absorbs=False: attention.Attention(
            t.width,
            t.heads,
            self.dtype,
            kernel_init=qkv_init,
            out_init=xavier,
            dropout=t.dropout,
            absorbs=absorbs,
            name=name,
        )
        y = norm("norm_1")(content)
        q = y + query_embed
        content = content + drop(attend("self_attention")(q, q, y, None, keys, 0), 1)
        q = norm("norm_2")(content) + query_embed
        cross = attend("cross_attention", True)(q, memory, memory, mask, keys, 2)
        content = content + drop(cross, 3)
        mlp = layers.MLP(
            t.width,
            t.mlp_dim,
            "relu",
            self.dtype,
            in_init=xavier,
            out_init=xavier,
            in_bias_init=layers.torch_bias(t.width),
            out_bias_init=layers.torch_bias(t.mlp_dim),
            dropout=t.dropout,
            name="mlp",
        )
        content = content + drop(mlp(norm("norm_3")(content), keys, 4), 5)
        content = placement.by_batch(content)
        return content, content


class QueryDecoder(nn.Module):
    """Image tokens -> content of every query after every layer."""

    tower: RegionDecoder
    dtype: np.dtype
    remat: str = "none"

    @nn.compact
    def __call__(self, image_tokens, dropout_keys=None):
        """image_tokens [B, N, E_image], dropout_keys [B] or None -> normed [T, B, Q+1 or Q, E]."""
        t, mask, length = self.tower, None, image_tokens.shape[1]
        if extra := placement.on_gpu() * (-length % 8):  # else each layer fills it for cuBLAS
            image_tokens = jnp.pad(image_tokens, ((0, 0), (0, extra), (0, 0)))
            mask = np.arange(length + extra) < length
        memory = layers.dense(
            t.width,
            ("width",),
            ("vector",),
            dtype=self.dtype,
            kernel_init=layers.torch_linear,
            use_bias=False,
            name="memory_projection",
        )(image_tokens)
        memory = layers.LayerNorm(t.norm_eps, name="memory_norm")(memory)
        query_embed = layers.parameter(
            self, "query_embed", layers.normal(1.0), ("queries", "width"), (t.inputs, t.width)
        ).astype(self.dtype)
        content = jnp.zeros((memory.shape[0], *query_embed.shape), self.dtype)
        every = nn.broadcast
        blocks = layers.scan_layers(
            DecoderLayer,
            t.depth,
            remat=self.remat,
            unroll=layers.unrolled(t, self.remat, "cudnn" if placement.on_gpu() else "xla"),
            in_axes=(0, every, every, every, every),
        )(t, self.dtype, name="blocks")
        _, hidden = blocks(content, jnp.arange(t.depth), memory, mask, query_embed, dropout_keys)
        return layers.LayerNorm(t.norm_eps, name="norm")(hidden)


class BoxMLP(nn.Module):
    """Three dense layers with ReLU between and a sigmoid after."""

    width: int
    dtype: np.dtype

    @nn.compact
    def __call__(self, hidden):
        """[..., E] -> float32 boxes [..., 4], cxcywh in [0, 1]."""
        for i, features in enumerate((self.width, self.width, 4)):
            hidden = layers.dense(
                features,
                ("width",),
                ("vector",),
                dtype=self.dtype,
                kernel_init=layers.torch_linear,
                bias_init=layers.torch_bias(self.width),
                name=f"layer_{i}",
            )(hidden)
            if i < 2:
                hidden = nn.relu(hidden)
        return nn.sigmoid(hidden.astype(jnp.float32))


ANCHOR_SIDE = 0.38  # of the boxes of patches before training
# Factor of the pointer's logits: with it they have a deviation of 2 before training.
SHARPNESS = 6.0


class Pointer(nn.Module):
    """Boxes of queries, as means of boxes of patches (docs/method.md, Pointer).

    Each patch predicts whether it shows an object, and the object's box relative to its own place (FCOS, Tian
    et al. 2019). A query points at patches by a softmax. So no query has to learn where boxes are. A model
    without a decoder has the boxes of patches alone.
    """

    width: int
    dtype: np.dtype

    @nn.compact
    def __call__(self, hidden, patches, centre_xy):
        """The boxes of queries and of patches.

        Args:
          hidden: [T, B, Q, E], the queries after each layer; None: there are none.
          patches: [B, P, E_image].
          centre_xy: float32 [B, P, 2], the centres of the patches in [0, 1].

        Returns:
          (float32 boxes_cxcywh [T, B, Q, 4] or None, schema.TokenBoxes).
        """
        dense = lambda features, name, use_bias=True: layers.dense(
            features,
            ("width",),
            ("vector",),
            dtype=self.dtype,
            kernel_init=layers.torch_linear,
            use_bias=use_bias,
            name=name,
        )
        out = dense(5, "layer_1")(nn.relu(dense(self.width, "layer_0")(patches)))
        offset, logit = jnp.split(out.astype(jnp.float32), [4], axis=-1)
        anchor = jnp.concatenate([centre_xy, jnp.full_like(centre_xy, ANCHOR_SIDE)], axis=-1)
        boxes = nn.sigmoid(offset + jnp.log(anchor / (1 - anchor)))
        token_boxes = schema.TokenBoxes(boxes, logit[..., 0], centre_xy)
        if hidden is None:
            return None, token_boxes
        query = dense(self.width, "query", use_bias=False)(hidden)
        key = dense(self.width, "key", use_bias=False)(patches)
        logits = jnp.einsum("tbqe,bpe->tbqp", query, key).astype(jnp.float32)
        logits = logits * (SHARPNESS * self.width**-0.5) + logit[..., 0][:, None]
        weights = jax.nn.softmax(logits, axis=-1)
        of_queries = jnp.einsum("tbqp,bpc->tbqc", weights, boxes, precision=jax.lax.Precision.HIGHEST)
        return of_queries, token_boxes
