"""GRAIN: two towers and a region decoder, from a batch to embeddings and boxes (docs/method.md, Model).

Without a decoder it is a two-tower model, such as CLIP: no regions, and the image embedding is pooled.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import boxes as boxes_lib
from grain_jax.core import errors, schema
from grain_jax.models import box_head, layers, region_decoder, text, tower_layer, towers

xavier = nn.initializers.xavier_uniform()


def normalize(x):
    """`x` [..., D] with unit length, float32; as torch.nn.functional.normalize (norm >= 1e-12)."""
    x = x.astype(jnp.float32)
    # The square root's gradient at 0 is infinite: a zero vector must give a zero gradient, not NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.where(square > 1e-24, jnp.maximum(square, 1e-24) ** -0.5, 1e12)


class GRAIN(nn.Module):
    """The model."""

    config: config_lib.Model  # towers, decoder and the width D of the joint space
    dtype: str = "float32"  # of activations, "float32" or "bfloat16"; parameters are float32
    remat: str = "none"  # what the backward pass keeps (config.REMAT_POLICIES)
    lora: float = 0.0  # `optim.lora.scale`: factors in the parameters count by it; 0: they do not count

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.dtype)
        self.image = towers.image_tower(c.image)(c.image, dtype, self.remat, c.attention, self.lora)
        self.text = towers.text_tower(c.text)(c.text, dtype, self.remat, c.attention, self.lora)
        self.text_norm = layers.LayerNorm(c.text.norm_eps)
        if c.text.pool == "map":
            self.text_pool = tower_layer.AttentionPool(c.text, dtype, c.text.heads)
        project = lambda width, kind: layers.dense(
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
            if c.decoder.boxes == "query":
                self.box_mlp = region_decoder.BoxMLP(c.decoder.width, dtype)
            self.region_projection = project(c.decoder.width, "matrix")
            if not c.tower_pools:
                self.image_projection = project(c.decoder.width, "matrix")
        if c.tower_pools:
            if c.image.pool == "map":
                heads = c.image.pool_heads or c.image.heads
                self.image_pool = tower_layer.AttentionPool(c.image, dtype, heads)
            if c.image.projection != "none":
                self.image_projection = project(c.image.width, c.image.projection)
        if c.patches_predict_boxes:
            width = c.image.width if c.decoder is None else c.decoder.width
            self.pointer = region_decoder.Pointer(width, dtype)
        if c.boxes.kind != "none":
            self.box_head = box_head.RoIAlign(c.boxes, c.image, dtype)
            self.box_projection = layers.dense(
                c.embed_dim, ("width",), ("embed",), dtype=dtype, kernel_init=xavier, use_bias=False
            )
        # In log space, as in CLIP; Outputs hold its exponential.
        scalar = lambda name, value: layers.parameter(self, name, nn.initializers.constant(value), (), ())
        self.logit_scale = scalar("logit_scale", np.log(c.logit_scale_init))
        sigmoid = c.logit_bias_init is not None
        if sigmoid:
            self.logit_bias = scalar("logit_bias", c.logit_bias_init)
        if c.regions_have_scale:
            # The published scale fits trained embeddings; new ones start as CLIP and SigLIP started.
            self.region_logit_scale = scalar("region_logit_scale", np.log(10 if sigmoid else 1 / 0.07))
            self.region_logit_bias = scalar("region_logit_bias", -10.0) if sigmoid else jnp.zeros(())

    def image_tokens(self, image: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        """Images to their tokens. Raises UserError: the tower does not take this size, or `kept`.

        Args:
          image: uint8 [B, H, W, 3], or float32 already normalised.
          kept: int32 [B, n], the numbers of the patches that the tower sees, ascending; None: all.

        Returns:
          [B, N, E_image]; [B, E_image] with a tower that pools them itself.
        """
        image = self._normalised(image)
        if kept is None:
            return self.image(image)
        if not self.image.takes_kept:
            raise errors.UserError(
                f"model.image.keep: got a fraction with the tower {self.config.image.tower}, which sees all"
                " patches; expected 1, or a tower with takes_kept = True"
            )
        return self.image(image, kept=kept)  # type: ignore[call-arg]

    def image_values(self, image: jax.Array) -> jax.Array:
        """As `image_tokens`; in the last layer each token attends to itself alone. Of vit.py only."""
        tower: Any = self.image
        return tower(self._normalised(image), values=True)

    @nn.nowrap
    def _normalised(self, image: jax.Array) -> jax.Array:
        """Images as the tower takes them. Raises UserError: of a size that it does not take."""
        config = self.config.image
        mean, std = (np.array(x, np.float32) for x in (config.pixel_mean, config.pixel_std))
        if image.dtype == jnp.uint8:
            image = (image.astype(jnp.float32) / 255.0 - mean) / std
        size, (height, width) = config.image_size, image.shape[1:3]
        if (height, width) != (size, size) and not self.image.any_size:
            raise errors.UserError(
                f"model.image.tower: {config.tower} got an image of {height} x {width} pixels, expected"
                f" model.image.image_size = {size}; a tower with any_size = True takes others"
            )
        return image

    def embeddings(
        self, tokens: jax.Array, dropout_keys: jax.Array | None = None, kept: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, schema.TokenBoxes | None]:
        """The embeddings and boxes of images from their tokens; `kept` as of `image_tokens`.

        Returns:
          (image_embed [B, D], region_embed [B, Q, D], pred_boxes_cxcywh [B, T, Q, 4], the boxes that patches
          predict, or None). Without a decoder Q is 0 and T is 1.
        """
        decoder, batch, token_boxes = self.config.decoder, tokens.shape[0], None
        if decoder is None:
            no_regions = jnp.zeros((batch, 0, self.config.embed_dim)), jnp.zeros((batch, 1, 0, 4))
            if self.config.patches_predict_boxes:
                _, token_boxes = self._point(None, tokens, kept)
            return normalize(self._pooled_image(tokens)), *no_regions, token_boxes
        hidden = self.decoder(tokens, dropout_keys)
        regions = hidden[:, :, : decoder.queries]
        if decoder.boxes == "pointer":
            boxes, token_boxes = self._point(regions, tokens, kept)
        else:
            boxes = self.box_mlp(regions)
        if decoder.image_pool == "tower":
            image_embed = normalize(self._pooled_image(tokens))
        else:
            image_embed = normalize(self.image_projection(hidden[-1, :, -1]))
        boxes = boxes.swapaxes(0, 1)
        region_embed = self.region_projection(regions[-1])
        if decoder.reads_box:  # no gradient through the corners: L_box alone moves them
            corners = boxes_lib.cxcywh_to_xyxy(jax.lax.stop_gradient(boxes[:, -1]))
            region_embed += self._read_boxes(tokens, corners, kept)
        region_embed = normalize(region_embed)
        if decoder.image_pool == "all":
            image_embed = normalize(image_embed + region_embed.sum(axis=1))
        return image_embed, region_embed, boxes, token_boxes

    @nn.nowrap
    def _point(self, regions, tokens, kept) -> Any:
        """What the pointer makes of queries [T, B, Q, E], or None, and of the patches."""
        patches = tokens[:, self.image.leading_tokens(self.config.image) :]
        return self.pointer(regions, patches, self._patch_centres(patches, kept))

    @nn.nowrap
    def _patch_centres(self, patches, kept):
        """The centres of the patches [B, P, E], float32 [B, P, 2]; `kept` as of `image_tokens`."""
        if kept is None:
            centres = box_head.patch_centres(box_head.grid_size(patches.shape[1], 0))
            return jnp.broadcast_to(centres, (patches.shape[0], *centres.shape))
        image = self.config.image
        return jnp.asarray(box_head.patch_centres(image.image_size // image.patch_size))[kept]

    def box_embeddings(
        self, tokens: jax.Array, boxes_xyxy: jax.Array, kept: jax.Array | None = None
    ) -> jax.Array:
        """Tokens and boxes [B, R, 4], corners in [0, 1] -> [B, R, D], unit length; needs a box head."""
        return normalize(self._read_boxes(tokens, boxes_xyxy, kept))

    @nn.nowrap
    def _read_boxes(self, tokens, boxes_xyxy, kept=None):
        """As `box_embeddings`, of any length."""
        leading = self.image.leading_tokens(self.config.image)
        return self.box_projection(self.box_head(tokens, boxes_xyxy, leading, kept))

    def patch_embeddings(self, tokens: jax.Array) -> jax.Array:
        """Tokens -> [B, P, D], each patch pooled and projected alone, row by row; of a tower that pools."""
        patches = tokens[:, self.image.leading_tokens(self.config.image) :]
        # Pooling "class" reads the first token, "mean" those after the leading ones: a patch stands for all.
        alone = jnp.repeat(patches.reshape(-1, 1, tokens.shape[2]), tokens.shape[1] - patches.shape[1] + 1, 1)
        return normalize(self._pooled_image(alone)).reshape(*patches.shape[:2], -1)

    def _pooled_image(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, N, E_image] -> [B, D], by `pool` and `projection`; [B, E_image] is pooled already."""
        config, tower = self.config.image, self.image
        if tower.pooled:
            x = tokens
        elif config.pool == "map":
            x = self.image_pool(tokens)
        elif config.pool == "class":
            x = tokens[:, 0]
        else:
            # The mean leaves out the class token, as in open_clip and timm.
            x = tokens[:, tower.leading_tokens(config) :].mean(axis=1)
        return x if config.projection == "none" else self.image_projection(x)

    def text_features(self, tokens, positions, segments, *at: jax.Array) -> tuple[jax.Array, ...]:
        """Rows [G, rows, L] -> for each `at` ([B, ..., 2]) the projected features of its texts."""
        hidden = self.text(tokens, positions, segments)
        return tuple(self._read_texts(hidden, segments, a) for a in at)

    def _read_texts(self, hidden: jax.Array, segments: jax.Array, end_at: jax.Array) -> jax.Array:
        """The projected features of texts, from the vectors of all tokens."""
        config = self.config.text
        if self.text.pooled:  # one vector per row
            x = text.gather_texts(hidden[:, :, None], end_at * np.array([1, 0]))
        elif config.pool in ("map", "mean"):
            rows, real = text.rows_of_texts(self.text_norm(hidden), segments, end_at)
            real = real if config.mask_padding else jnp.ones_like(real)
            if config.pool == "map":
                pooled = self.text_pool(rows, real[:, None, None])
            else:
                pooled = text.masked_mean(rows, real)
            x = pooled.reshape(*end_at.shape[:-1], pooled.shape[-1])
        else:
            if config.pool == "last" and not config.mask_padding:
                end_at = jnp.asarray(end_at).at[..., 1].set(hidden.shape[2] - 1)
            x = self.text_norm(text.gather_texts(hidden, end_at))
        return x if config.projection == "none" else self.text_projection(x)

    def encode_text(self, tokens, positions, segments, *at: jax.Array) -> tuple[jax.Array, ...]:
        """As `text_features`, of unit length."""
        return tuple(map(normalize, self.text_features(tokens, positions, segments, *at)))

    def __call__(self, batch: schema.Batch, dropout_keys: jax.Array | None = None) -> schema.Outputs:
        """A batch to its embeddings, boxes and logit scale; with `dropout_keys` [B] as in training."""
        return self.outputs_and_features(batch, dropout_keys)[0]

    def outputs_and_features(
        self, batch: schema.Batch, dropout_keys: jax.Array | None = None, kept: jax.Array | None = None
    ) -> tuple[schema.Outputs, schema.Features]:
        """As a call, and what local loss terms see (losses/local.py); `kept` as of `image_tokens`."""
        tokens = self.image_tokens(batch.image, kept)
        image_embed, region_embed, boxes, token_boxes = self.embeddings(tokens, dropout_keys, kept)
        box_embed = None
        if self.config.boxes.kind != "none":
            corners = boxes_lib.cxcywh_to_xyxy(batch.region_boxes_cxcywh)
            box_embed = self.box_embeddings(tokens, corners, kept)
        b, captions, _ = batch.caption_at.shape
        hidden = self.text(batch.text_tokens, batch.text_positions, batch.text_segments)
        embed = lambda at: normalize(self._read_texts(hidden, batch.text_segments, at))
        # Flat, since an axis of one caption would be padded to a register's eight rows.
        text_embed = embed(batch.caption_at.reshape(b * captions, 2)).reshape(b, captions, -1)
        own = self.config.regions_have_scale
        outputs = schema.Outputs(
            image_embed=image_embed,
            text_embed=text_embed,
            region_embed=region_embed,
            region_text_embed=embed(batch.description_at),
            pred_boxes_cxcywh=boxes,
            scales=schema.Scales(
                jnp.exp(self.logit_scale),
                jnp.zeros(()) if self.config.logit_bias_init is None else self.logit_bias,
                jnp.exp(self.region_logit_scale) if own else None,
                self.region_logit_bias if own else None,
            ),
            box_embed=box_embed,
            token_boxes=token_boxes,
            negative_text_embed=None if batch.negative_at is None else embed(batch.negative_at),
        )
        return outputs, schema.Features(tokens, hidden)


def leading_tokens(config: config_lib.Model) -> int:
    """The tokens of the image tower that stand for no place in the image; they come first."""
    return towers.image_tower(config.image).leading_tokens(config.image)


def flat(params) -> dict:
    """A parameter tree as {"a/b/c": leaf}, with or without the flax boxes of logical axes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def init(model: GRAIN, key: jax.Array):
    """The parameters of the model, boxed with their logical axes; no batch changes them."""
    size, length = model.config.image.image_size, model.config.text.context_length
    row = np.zeros((1, 1, length), np.int32)
    batch = schema.Batch(
        np.zeros((1, size, size, 3), np.float32),
        *(row, row, row),
        caption_at=np.zeros((1, 1, 2), np.int32),
        caption_id=None,
        caption_mask=None,
        description_at=np.zeros((1, 0, 2), np.int32),
        description_id=None,
        region_boxes_cxcywh=np.zeros((1, 0, 4), np.float32),
        region_mask=None,
        texts_dropped=None,
    )
    return model.init(key, jax.tree.map(jnp.asarray, batch))["params"]


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: config_lib.Model) -> Mapping[str, tuple[int, ...]]:
    """The name and shape of every parameter of the model; nothing is computed."""
    params = jax.eval_shape(lambda: init(GRAIN(config), jax.random.key(0)))
    return types.MappingProxyType({name: x.shape for name, x in flat(params).items()})
