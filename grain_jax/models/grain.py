"""GRAIN: two towers and a region decoder, from a batch to unit-length embeddings and boxes (method.md, Model)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax import schema
from grain_jax.models import layers, region_decoder, text, vit


def normalize(x):
    """Unit length over the last axis, in float32; as torch.nn.functional.normalize (norm at least 1e-12)."""
    x = x.astype(jnp.float32)
    # The square root's gradient at 0 is infinite: a zero vector must give a zero gradient, not NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.where(square > 1e-24, jnp.maximum(square, 1e-24) ** -0.5, 1e12)


class GRAIN(nn.Module):
    """The model. `dtype` is that of activations ("float32" or "bfloat16"); parameters are float32."""

    config: config_lib.Model
    dtype: str = "float32"
    remat: str = "none"

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.dtype)
        self.image = vit.ImageTransformer(c.image, dtype, self.remat)
        self.text = text.TextTransformer(c.text, dtype, self.remat)
        self.text_norm = layers.layer_norm(c.text.norm_eps, dtype=dtype)
        self.decoder = region_decoder.QueryDecoder(c.decoder, dtype, self.remat)
        self.box_mlp = region_decoder.BoxMLP(c.decoder.width, dtype)
        project = lambda width: layers.dense(  # noqa: E731
            c.embed_dim,
            ("width",),
            ("embed",),
            dtype=dtype,
            kernel_init=layers.normal(width**-0.5),
            use_bias=False,
        )
        self.text_projection = project(c.text.width)
        self.image_projection = project(c.decoder.width)
        self.region_projection = project(c.decoder.width)
        # In log space, as CLIP's; Outputs hold its exponential.
        self.logit_scale = self.param(
            "logit_scale",
            nn.with_logical_partitioning(nn.initializers.constant(np.log(c.logit_scale_init)), ()),
            (),
        )
        if c.logit_bias_init is not None:
            self.logit_bias = self.param(
                "logit_bias",
                nn.with_logical_partitioning(nn.initializers.constant(c.logit_bias_init), ()),
                (),
            )

    def image_features(self, image, dropout_keys=None):
        """Pictures to the decoder's features.

        Args:
          image: uint8 [B, H, W, 3], or float32 [B, H, W, 3] already normalised.
          dropout_keys: PRNG keys [B] (training), or None.

        Returns:
          (tokens [B, N, E_image], hidden [T, B, Q+1, E]); the last query is the image's.
        """
        if image.dtype == jnp.uint8:
            image = schema.rescale_pixels(image, jnp)
        tokens = self.image(image)
        return tokens, self.decoder(tokens, dropout_keys)

    def encode_image(self, image, dropout_keys=None):
        """Pictures [B, H, W, 3] -> (image_embed [B, D], region_embed [B, Q, D], pred_boxes_cxcywh [T, B, Q, 4])."""
        _, hidden = self.image_features(image, dropout_keys)
        return (
            normalize(self.image_projection(hidden[-1, :, -1])),
            normalize(self.region_projection(hidden[-1, :, :-1])),
            self.box_mlp(hidden[:, :, :-1]),
        )

    def text_features(self, tokens, positions, segments, *at):
        """Packed rows [G, rows, L] -> for each `at` ([B, 2] or [B, R, 2]) the texts' features, projected."""
        features = self.text(tokens, positions, segments)
        return tuple(
            self.text_projection(self.text_norm(text.gather_texts(features, a))) for a in at
        )

    def encode_text(self, tokens, positions, segments, *at):
        """As `text_features`, of unit length."""
        return tuple(map(normalize, self.text_features(tokens, positions, segments, *at)))

    def __call__(self, batch: schema.Batch, dropout_keys=None) -> schema.Outputs:
        """A batch to its embeddings, boxes and logit scale; `dropout_keys` [B] switches training on."""
        image_embed, region_embed, boxes = self.encode_image(batch.image, dropout_keys)
        text_embed, region_text_embed = self.encode_text(
            batch.text_tokens,
            batch.text_positions,
            batch.text_segments,
            batch.caption_at,
            batch.description_at,
        )
        return schema.Outputs(
            image_embed,
            text_embed,
            region_embed,
            region_text_embed,
            boxes,
            jnp.exp(self.logit_scale),
            jnp.zeros(()) if self.config.logit_bias_init is None else self.logit_bias,
        )
