"""Where things lie in an image, by a `Predictor`: embeddings of patches, similarity maps, classes of pixels.

`inference/segmentation.py` cuts images into windows and makes labels of maps; `scores` has the arithmetic of maps.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import PIL.Image

from grain_jax import config as config_lib
from grain_jax.core import errors, named
from grain_jax.inference import inputs, jitted, scores, segmentation
from grain_jax.inference.inputs import Images, InputError, OneOrMany, Tokens
from grain_jax.models import box_head, grain, towers


class Mapper:
    """The methods of a `Predictor` that answer for each patch or pixel."""

    # What they need of it.
    model: config_lib.Model
    params: Any
    dtype: str
    templates: Any
    logit_scale: Any
    has_regions: Any
    encode_text: Any
    encode_tokens: Any
    encode_regions: Any
    encode_boxes: Any
    _tokens_of: Any
    _need_regions: Any
    _all: Any

    def encode_patches(self, images: OneOrMany | Tokens, sides: Sequence[int] = (1,)) -> Any:
        """Images, as for `encode_boxes` -> an embedding of each patch, float32 [B, h, w, D], unit length.

        One image -> [h, w, D].

        With a box head a patch is a box, or the mean of boxes around it, `sides` patches wide; of a model of two towers
        each patch is pooled alone, as in MaskCLIP (Zhou et al. 2022).

        Raises:
          InputError: as `encode_image`; the image tower has no grid of patches; the model has a decoder and no box head.
        """
        if inputs.is_one_image(images):
            return self.encode_patches(inputs.one_image(images), sides)[0]
        grid = self.grid
        if self.model.boxes.kind != "none":
            tokens = images if isinstance(images, Tokens) else self.encode_tokens(images)
            boxes = [_around(grid, sides)] * len(tokens.values)
            patches = np.array([_means(x, sides) for x in self.encode_boxes(tokens, boxes)])
        elif self.model.decoder is not None:
            raise InputError(
                "patches: got a model with a decoder and no box head, expected a box head; similarity_maps asks the"
                " regions"
            )
        else:
            method = "patch_embeddings" if isinstance(images, Tokens) else "encode_patches"
            patches = self._all(jitted.program(self.model, self.dtype, method), images)
        return patches.astype(np.float32).reshape(-1, grid, grid, self.model.embed_dim)

    def similarity_map(
        self, image: PIL.Image.Image | np.ndarray, texts: str | Iterable[str] | np.ndarray
    ) -> np.ndarray:
        """Where each text lies in an image: cosines at the resolution of the patches, float32 [N, h, w].

        Of one text [h, w].

        Those of the patches (`encode_patches`); of a model with regions, the best of the regions at each patch
        (`scores.region_map`); of one with both, the mean of the two. `scores.resize_map` makes it as large as the image.

        Args:
          image: as for `ground`.
          texts: as for `encode_text`.

        Raises:
          InputError: image or texts cannot be used, or the image tower has no grid of patches.
        """
        if inputs.is_one_text(texts):
            return self.similarity_map(image, inputs.one_text(texts))[0]
        return self.similarity_maps(inputs.one_image(image), [self.encode_text(texts)])[0]

    def similarity_maps(
        self, images: Images | Tokens, text_embeds: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """For each image the maps of its own texts, as `similarity_map`: float32 [n, h, w].

        Args:
          images: a batch, as for `encode_image`; with a box head also the result of `encode_tokens`.
          text_embeds: for each image the embeddings [n, D] of its texts.

        Raises:
          InputError: the images cannot be used, or the image tower has no grid of patches.
        """
        has_head = self.model.boxes.kind != "none"
        if not isinstance(images, Tokens) and has_head:
            images = self._tokens_of(images)
        patches = regions = [None] * len(text_embeds)
        if has_head or self.model.decoder is None:
            patches = self.encode_patches(images)
        if self.has_regions or not has_head and self.model.decoder is not None:
            regions = list(zip(*self.encode_regions(images)))
        return [
            scores.similarity_map(text, patch, region, self.grid)
            for text, patch, region in zip(text_embeds, patches, regions, strict=True)
        ]

    def segment(
        self,
        images: OneOrMany,
        classes: Iterable[str] | Mapping[str, Sequence[str]] | segmentation.Classes,
        *,
        background: float | None = None,
        short_side: int = 0,
        stride: int = 0,
        **maps: Any,
    ) -> Any:
        """For each image the class of every pixel, int32 [H, W], positions in the classes; for one [H, W] alone.

        Args:
          images: PIL images, turned by their EXIF orientation, or uint8 [H, W, 3], of any size; or one.
          classes: names, {name: [description, ...]} or the result of `segmentation_classes`. Commas divide names of one
            class: "sofa, couch".
          background: pixels are -1 where the best class has a smaller share of the softmax of scaled cosines; None: none.
          short_side: pixels that the shorter side is resized to; 0: the model's image size.
          stride: pixels between windows of the model's size; 0: half of it.
          **maps: `by`, `patch_features`, `patch_weight` and `patch_sides`, as of `class_maps`.

        Raises:
          InputError: images, classes or options cannot be used.
        """
        size = self.model.image.image_size
        segmentation.check_stride(size, short_side, stride)
        if not isinstance(classes, segmentation.Classes):
            classes = self.segmentation_classes(classes)
        is_one = inputs.is_one_image(images)
        found, several = [], [images] if is_one else images
        for i, image in enumerate(cast(Iterable[Any], several)):
            options = size, short_side, stride, len(classes.names)
            windows = segmentation.windows_of(i, image, *options)
            of_windows = self.class_maps(windows.pixels, classes, **maps)
            scale = self.logit_scale
            found.append(
                segmentation.labels(
                    np.asarray(of_windows), windows, background=background, scale=scale
                )
            )
        return found[0] if is_one else found

    def segmentation_classes(
        self, classes: Iterable[str] | Mapping[str, Sequence[str]]
    ) -> segmentation.Classes:
        """Embeds classes for `segment`, once for any number of images; raises as `class_features`."""
        names, described = zip(*inputs.class_pairs(classes))
        described = [own or () for own in described] if any(described) else None
        return segmentation.embed_classes(self.encode_text, names, self.templates, described)

    def class_maps(
        self,
        images: Images,
        classes: segmentation.Classes,
        *,
        by: str = "auto",
        patch_features: str = "auto",
        patch_weight: float = 0.5,
        patch_sides: Sequence[int] = (1, 2, 3),
    ) -> Any:
        """Where every class lies in each image of a batch: cosines at the patches, float32 [B, C, h, w].

        Args:
          images: as for `encode_image`.
          classes: the result of `segmentation_classes`.
          by: "patches"; "regions", each query's cosine in its box (`scores.region_map`); "both"; or "auto", what the
            model has, as `similarity_maps`.
          patch_features: "tokens", the last ones (`encode_patches`); "values", where in the last layer each token
            attends to itself alone (MaskCLIP); or "auto", tokens with a box head, else values.
          patch_weight: share of the patches in "both"; the regions have the rest.
          patch_sides: `sides` of `encode_patches`. A box of one patch is smaller than any part that a box head has learnt,
            and it takes it for a small one (docs/claim.md, the fourth design).

        Raises:
          InputError: as `encode_image`; an unknown option; the model has no such patches or regions.
        """
        by, patch_features = self.maps_by(by, patch_features)
        grid, maps, tokens = self.grid, [], None
        images = images if hasattr(images, "dtype") else list(images)  # they may be read twice
        if by != "regions":
            tokens = self._tokens_of(images, f"image_{patch_features}")
            patches = classes.cosines(self.encode_patches(tokens, patch_sides)).transpose(
                0, 3, 1, 2
            )
            maps.append(patches)
        if by != "patches":
            shared = tokens if tokens is not None and patch_features == "tokens" else images
            regions = self.encode_regions(shared)
            cosines = classes.cosines(regions.embed).transpose(0, 2, 1)  # [B, C, Q]
            pairs = zip(cosines, regions.boxes_xyxy)
            maps.append(np.stack([scores.region_map(*pair, grid) for pair in pairs]))
        if len(maps) == 1:
            return maps[0]
        return np.float32(patch_weight) * maps[0] + np.float32(1 - patch_weight) * maps[1]

    def maps_by(self, by: str, patch_features: str) -> tuple[str, str]:
        """The options of `class_maps` without "auto". Raises InputError where the model cannot use them."""
        for name, value, known in (
            ("by", by, segmentation.WAYS),
            ("patch_features", patch_features, segmentation.PATCHES),
        ):
            if value not in known:
                raise InputError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        has_head = self.model.boxes.kind != "none"
        has_patches = has_head or self.model.decoder is None
        if by == "auto":
            by = "patches" if not self.has_regions else "both" if has_patches else "regions"
        if by != "patches":
            self._need_regions(f"by {by!r}")
        if by != "regions" and not has_patches:
            raise InputError(
                f"by {by!r}: got a model with a decoder and no box head, expected a box head, or by 'regions'"
            )
        if patch_features == "auto":
            is_values = not has_head and not named.is_external(self.model.image.tower)
            patch_features = "values" if is_values else "tokens"
        if (
            by != "regions"
            and patch_features == "values"
            and named.is_external(self.model.image.tower)
        ):
            raise InputError(
                f"patch_features 'values': got the tower {self.model.image.tower}, expected a built-in one, or 'tokens'"
            )
        return by, patch_features

    @functools.cached_property
    def grid(self) -> int:
        """Patches along a side of an image. Raises InputError where the tower has no grid of them."""
        size = self.model.image.image_size
        pixels = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        module = grain.GRAIN(self.model, self.dtype)
        apply = functools.partial(module.apply, method=grain.GRAIN.image_tokens)
        shape = jax.eval_shape(apply, {"params": self.params}, pixels).shape
        tower = towers.image_tower(self.model.image)
        try:
            if tower.pooled:
                raise errors.UserError(
                    "model.image.tower: pools its tokens, expected a grid of them"
                )
            return box_head.grid_size(shape[1], tower.leading_tokens(self.model.image))
        except errors.UserError as error:
            raise InputError(str(error)) from None


def _around(grid: int, sides: Sequence[int]) -> np.ndarray:
    """Boxes around each patch of a grid, so many patches wide, float32 xyxy [S * grid * grid, 4], cut at the image.

    Raises:
      InputError: there are no `sides`, or one is below 1.
    """
    if min(sides, default=0) < 1:
        raise InputError(f"sides: got {tuple(sides)}, expected numbers of patches, 1 or more")
    y, x = np.divmod(np.arange(grid * grid), grid)
    middle = np.stack([x, y], axis=1) + 0.5
    half = np.array(sides)[:, None, None] / 2
    corners = np.concatenate([middle - half, middle + half], axis=-1).reshape(-1, 4)
    return np.clip(corners / grid, 0, 1).astype(np.float32)


def _means(embeds: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """Embeddings of the boxes of each of `sides` [S * P, D] -> their means, [P, D], unit length."""
    total = embeds.astype(np.float32).reshape(len(sides), -1, embeds.shape[-1]).sum(axis=0)
    return total / np.linalg.norm(total, axis=-1, keepdims=True)
