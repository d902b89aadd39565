"""GRAIN: two towers and a region decoder, from a batch to unit-length embeddings and boxes (docs/method.md, Model).

Without a decoder it is a two-tower model, such as CLIP: no regions, and the image embedding is pooled.
"""

import flax.linen as nn
import jax
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
        self.text_norm = layers.LayerNorm(c.text.norm_eps)
        if c.text.pool == "map":
            self.text_pool = layers.AttentionPool(c.text, dtype)
        project = lambda width, kind: layers.dense(  # noqa: E731
            c.embed_dim,
            ("width",),
            ("embed",),
            dtype=dtype,
            kernel_init=layers.normal(width**-0.5),
            use_bias=kind == "affine",
        )
        if c.text.projection != "none":
            self.text_projection = project(c.text.width, c.text.projection)
        if c.decoder is not None:
            self.decoder = region_decoder.QueryDecoder(c.decoder, dtype, self.remat)
            self.box_mlp = region_decoder.BoxMLP(c.decoder.width, dtype)
            self.image_projection = project(c.decoder.width, "matrix")
            self.region_projection = project(c.decoder.width, "matrix")
        else:
            if c.image.pool == "map":
                self.image_pool = layers.AttentionPool(c.image, dtype)
            if c.image.projection != "none":
                self.image_projection = project(c.image.width, c.image.projection)
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

    def image_tokens(self, image):
        """Pictures, uint8 [B, H, W, 3] or float32 already normalised, -> tokens [B, N, E_image]."""
        if image.dtype == jnp.uint8:
            tower = self.config.image
            mean, std = (np.array(x, np.float32) for x in (tower.pixel_mean, tower.pixel_std))
            image = (image.astype(jnp.float32) / 255.0 - mean) / std
        return self.image(image)

    def image_features(self, image, dropout_keys=None):
        """Pictures to the decoder's features.

        Args:
          image: uint8 [B, H, W, 3], or float32 [B, H, W, 3] already normalised.
          dropout_keys: PRNG keys [B] (training), or None.

        Returns:
          (tokens [B, N, E_image], hidden [T, B, Q+1, E]); the last query is the image's.
        """
        tokens = self.image_tokens(image)
        return tokens, self.decoder(tokens, dropout_keys)

    def encode_image(self, image, dropout_keys=None):
        """Pictures [B, H, W, 3] -> (image_embed [B, D], region_embed [B, Q, D], pred_boxes_cxcywh [T, B, Q, 4]).

        Without a decoder Q is 0 and T is 1.
        """
        if self.config.decoder is None:
            embed = self._pooled_image(self.image_tokens(image))
            batch = image.shape[0]
            return (
                normalize(embed),
                jnp.zeros((batch, 0, self.config.embed_dim)),
                jnp.zeros((1, batch, 0, 4)),
            )
        _, hidden = self.image_features(image, dropout_keys)
        return (
            normalize(self.image_projection(hidden[-1, :, -1])),
            normalize(self.region_projection(hidden[-1, :, :-1])),
            self.box_mlp(hidden[:, :, :-1]),
        )

    def _pooled_image(self, tokens):
        """Tokens [B, N, E_image] -> [B, D], by the tower's pooling and projection."""
        tower = self.config.image
        if tower.pool == "map":
            x = self.image_pool(tokens)
        else:
            # A class token is no patch: it is left out of the mean, as in open_clip and timm.
            patches = tokens[:, int(tower.class_token) :]
            x = tokens[:, 0] if tower.pool == "class" else patches.mean(axis=1)
        return x if tower.projection == "none" else self.image_projection(x)

    def text_features(self, tokens, positions, segments, *at):
        """Packed rows [G, rows, L] -> for each `at` ([B, 2] or [B, R, 2]) the texts' features, projected."""
        tower = self.config.text
        features = self.text(tokens, positions, segments)
        if tower.pool in ("map", "mean"):  # a row is a text
            features = self.text_norm(features)
            rows = features.reshape(-1, *features.shape[2:])
            pooled = self.text_pool(rows) if tower.pool == "map" else rows.mean(axis=1)
            features = pooled.reshape(*features.shape[:2], 1, -1)
            at = [a * np.array([1, 0]) for a in at]
        elif tower.pool == "last":
            at = [a.at[..., 1].set(features.shape[2] - 1) for a in map(jnp.asarray, at)]

        def read(a):
            x = text.gather_texts(features, a)
            if tower.pool not in ("map", "mean"):
                x = self.text_norm(x)
            return x if tower.projection == "none" else self.text_projection(x)

        return tuple(read(a) for a in at)

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


def flat(params) -> dict:
    """A parameter tree as {"a/b/c": leaf}, with or without the boxes of logical axes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def parameter_shapes(config: config_lib.Model) -> dict[str, tuple[int, ...]]:
    """The model's flat parameter names and their shapes; nothing is computed."""
    size, length = config.image.image_size, config.text.context_length
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    row = of(np.int32, 1, 1, length)
    batch = schema.Batch(
        of(np.float32, 1, size, size, 3),
        *(row, row, row),
        caption_at=of(np.int32, 1, 2),
        caption_id=None,
        description_at=of(np.int32, 1, 0, 2),
        description_id=None,
        region_boxes_cxcywh=None,
        region_mask=None,
        texts_dropped=None,
    )
    params = jax.eval_shape(GRAIN(config).init, jax.random.key(0), batch)["params"]
    return {name: x.shape for name, x in flat(params).items()}
