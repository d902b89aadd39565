"""Texts pool the patches of images, and tell those of their own image from others (docs/method.md, Local terms)."""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import fields
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen
from grain_jax.models import layers, places, towers
from grain_jax.models.grain import normalize

xavier = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the term."""

    # Consecutive images whose patches each text pools; it divides the images of a device's micro-batch.
    group: int = fields.count(16, low=2, high=4096)
    captions: bool = fields.key(True)  # whether captions pool, beside descriptions
    heads: int = fields.count(8, low=1, high=1024)  # of the attention; must divide model.embed_dim
    scale_init: float = fields.key(10.0, low=1e-3, high=1e3)  # initial factor of the cosines
    # Initially added to them; None: -ln(group - 1), for so many negatives a text.
    bias_init: float | None = fields.key(None, low=-1e3, high=1e3)

    @property
    def bias(self) -> float:
        """The initial one."""
        return -math.log(self.group - 1) if self.bias_init is None else self.bias_init


class TextPooled(LocalTerm):
    """Text-conditioned attention pooling and its sigmoid loss, of FLAIR (Xiao et al., CVPR 2025, arXiv 2412.03561).

    The embedding of a text is the query of an attention over the patches of an image and an empty token, whose key and
    value are 0. What it pools, of unit length, is compared with the text: with v_jt the pool of text t over image j,

        z_jt = s v_jt . t + c,   loss of t = log(1 + exp(-z_it)) + sum over images j != i of log(1 + exp(z_jt))

    where i is the image of t and j another one of its group that does not have t as well, whatever
    `loss.mask_duplicates` says. The loss is the mean over the texts. The attention goes over one image of the group at
    a time, so memory does not grow with the group.
    Measures `accuracy`, the share of the texts whose own image gives the highest z of the group.
    """

    Options: ClassVar[type] = Options
    any_grid: ClassVar[bool] = True

    @classmethod
    def group(cls, options: Any) -> int:
        """See `Options.group`."""
        return options.group

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """Lines of a run without texts or patches, and of heads that do not fit."""
        found, width = [], config.model.embed_dim
        if width % options.heads:
            found.append(
                f"heads: got {options.heads}, expected a divisor of model.embed_dim={width}"
            )
        if towers.image_tower(config.model.image).pooled:
            got = f"model.image.tower: got {config.model.image.tower}, which pools its tokens"
            found.append(f"{got}, expected one with patches")
        if not (options.captions or config.input.max_regions):
            found.append("captions: got False with input.max_regions=0, expected a text an image")
        return found

    def setup(self):
        config, dtype = self.model, np.dtype(self.dtype)
        self.text_norm = layers.LayerNorm(config.text.norm_eps)
        self.key_norm = layers.LayerNorm(config.image.norm_eps)
        self.value_norm = layers.LayerNorm(config.image.norm_eps)
        width, heads = config.embed_dim, self.options.heads
        to_heads = lambda axis: layers.dense(
            (heads, width // heads),
            (axis,),
            ("heads", "head_dim"),
            dtype=dtype,
            kernel_init=xavier,
        )
        self.query, self.key, self.value = to_heads("embed"), to_heads("width"), to_heads("width")
        # Not a module: Flax makes none inside the loop over images.
        matrix = lambda key, shape, dtype=jnp.float32: xavier(key, (width,) * 2, dtype).reshape(
            shape
        )
        axes, shape = ("heads", "head_dim", "embed"), (heads, width // heads, width)
        self.out_kernel = layers.parameter(self, "out_kernel", matrix, axes, shape)
        self.out_bias = layers.parameter(self, "out_bias", layers.zeros, ("vector",), (width,))
        constant = lambda name, value: layers.parameter(
            self, name, nn.initializers.constant(value), (), ()
        )
        self.logit_scale = constant("logit_scale", np.log(self.options.scale_init))
        self.logit_bias = constant("logit_bias", self.options.bias)

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sum over the texts of each image."""
        text, ids, real = _texts(seen, self.options.captions)
        group = self.options.group
        in_groups = lambda x: x.reshape(-1, group, *x.shape[1:])
        patches = seen.tokens[:, seen.leading :]
        real_patches = places.keys(seen.places, patches.shape[1])
        query = self.query(self.text_norm(text))  # [B, S, K, D / K]
        keys, values = self.key(self.key_norm(patches)), self.value(self.value_norm(patches))

        @jax.checkpoint
        def cosines(shift):
            """Those of each text and what it pools of the image `shift` places on in the group, [B, S]."""
            on = lambda x, by: jnp.roll(in_groups(x), by, axis=1).reshape(x.shape)
            pooled = self._out(_attend(on(query, shift), keys, values, real_patches))
            return on(jnp.sum(normalize(pooled) * on(text, shift), -1), -shift)

        cosine = jax.lax.map(cosines, jnp.arange(group))  # [group, B, S]
        z = jnp.exp(self.logit_scale) * cosine + self.logit_bias
        has_it = _shifted(_has_text(in_groups(ids), in_groups(real))).reshape(z.shape)
        negative = jnp.where(has_it, 0, jax.nn.softplus(z)).at[0].set(0)
        loss = jnp.where(real, jax.nn.softplus(-z[0]) + negative.sum(0), 0)
        others = jnp.where(has_it, -jnp.inf, cosine)[1:].max(0)
        right = (real & (cosine[0] > others)).sum(1).astype(jnp.float32)
        count = real.sum(1).astype(jnp.float32)
        return LocalOutput(PerImage(loss.sum(1), count), {"accuracy": PerImage(right, count)})

    def _out(self, pooled: jax.Array) -> jax.Array:
        """Heads side by side to the joint space, [B, S, K, D / K] -> [B, S, D]."""
        kernel, bias = (x.astype(pooled.dtype) for x in (self.out_kernel, self.out_bias))
        return jnp.einsum("bskh,khd->bsd", pooled, kernel) + bias


def _texts(seen: Seen, captions: bool):
    """(embeddings [B, S, D], ids [B, S], where they are real bool [B, S]): descriptions, then captions."""
    batch, outputs = seen.batch, seen.outputs
    found = outputs.region_text_embed, batch.description_id, batch.region_mask
    if captions:
        more = outputs.text_embed, batch.caption_id, batch.caption_mask
        found = tuple(jnp.concatenate(x, axis=1) for x in zip(found, more, strict=True))
    return found


def _attend(query, keys, values, real):
    """Attention of each text of an image to its patches and the empty token, [B, S, K, h], [B, P, K, h] twice.

    `real` are the patches that are there, bool [B, 1, 1, P]; None: all.
    """
    size = query.shape[-1]
    logits = jnp.einsum(
        "bskh,bpkh->bksp", query * size**-0.5, keys, preferred_element_type=jnp.float32
    )
    if real is not None:
        logits = jnp.where(real, logits, jnp.finfo(jnp.float32).min)
    empty = jnp.zeros((*logits.shape[:-1], 1))
    weights: Any = layers.softmax(jnp.concatenate([logits, empty], axis=-1), values.dtype)
    return jnp.einsum("bksp,bpkh->bskh", weights[..., :-1], values)


def _has_text(ids, real):
    """Ids [n, g, S] of the texts of the images of each group -> bool [n, g, S, g]: image j has text (i, s), too."""
    same = ids[:, :, :, None, None] == ids[:, None, None]
    return (same & real[:, None, None]).any(-1)


def _shifted(has_text):
    """[n, g, S, g] by image -> [g, n, g, S] by the places from the text's own image to it."""
    group = has_text.shape[1]
    image = (np.arange(group) + np.arange(group)[:, None]) % group  # [shift, own image]
    return has_text[:, np.arange(group), :, image].transpose(0, 2, 1, 3)
