"""Further views of the images of a batch, made on the devices: random crops, mirrored, in other colours.

One global view and `local` small ones of each image, by `input.views`. Everything that is drawn is a function of the
key of the image and the number of the view alone, so micro-batches and meshes agree, and view i is the same whatever
number of views is asked for. docs/method.md, Views.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core.schema import Array
from grain_jax.models import placement

_GREY = np.array((0.2989, 0.587, 0.114), np.float32)  # of ITU-R BT.601, as torchvision rounds them
_TOUCHED = 1e-3  # of a pixel inside the crop, below which rounding alone put it there


class View(NamedTuple):
    """V views of each image of a batch."""

    image: Array  # float32 [B, V, S, S, 3] in [0, 1]
    boxes_xyxy: (
        jax.Array
    )  # float32 [B, V, 4], the place of the view in the image, as shares of the image
    flipped: Array  # bool [B, V]: mirrored, left and right change places


class Views(NamedTuple):
    """The views of the images of a batch."""

    global_view: View  # V = 1, of the size of the image
    local: View  # V = input.views.local, of input.views.size


class _Draws(NamedTuple):
    """What is drawn for a view: float32 [B, V] each, in [0, 1)."""

    area: jax.Array
    aspect: jax.Array
    left: jax.Array
    top: jax.Array
    mirror: jax.Array
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    grey: jax.Array


def make(image: Array, keys: Array, config: config_lib.Views) -> Views | None:
    """The views of images.

    Args:
      image: uint8 [B, H, W, 3], or float32 in [0, 1].
      keys: PRNG keys [B] of the images.
      config: `input.views`.

    Returns:
      None where `config.local` is 0.
    """
    if not config.local:
        return None
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 255.0
    drawn = _drawn(keys, 1 + config.local)
    first, rest = (_Draws(*parts) for parts in zip(*(jnp.split(x, [1], 1) for x in drawn)))
    return Views(
        _view(image, first, image.shape[1:3], (config.global_min_area, 1.0), config),
        _view(image, rest, (config.size, config.size), (config.min_area, config.max_area), config),
    )


def _drawn(keys: jax.Array, views: int) -> _Draws:
    count = len(_Draws._fields)
    of_view = lambda key, view: jax.random.uniform(jax.random.fold_in(key, view), (count,))
    of_image = jax.vmap(of_view, (None, 0))
    return _Draws(*jnp.moveaxis(jax.vmap(of_image, (0, None))(keys, jnp.arange(views)), -1, 0))


def _view(
    image: jax.Array,
    draws: _Draws,
    size: tuple[int, int],
    areas: tuple[float, float],
    config: config_lib.Views,
) -> View:
    flipped = draws.mirror < config.flip_rate
    boxes = _places(draws, *areas, config.max_aspect)
    # Of least area 1 the only place is the whole image, and its resize to its own size is itself.
    whole = areas[0] == 1 and size == image.shape[1:3]
    seen = image[:, None] if whole else crops(image, boxes, size)
    seen = jnp.where(flipped[..., None, None, None], seen[..., ::-1, :], seen)
    return View(placement.by_batch(_coloured(seen, draws, config)), boxes, flipped)


def _places(draws: _Draws, least: float, most: float, max_aspect: float) -> jax.Array:
    """Boxes in the image, xyxy [B, V, 4]: the area is uniform, the logarithm of the aspect as well.

    The ratio of the sides stays so near to 1 that a box of the area fits into the image.
    """
    area = least + (most - least) * draws.area
    limit = jnp.minimum(np.float32(np.log(max_aspect)), -jnp.log(area))
    aspect = jnp.exp(limit * (2 * draws.aspect - 1))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], -1), 1)
    corner = jnp.stack([draws.left, draws.top], -1) * (1 - sides)
    return jnp.concatenate([corner, jnp.minimum(corner + sides, 1)], -1)


def crops(image: Array, boxes_xyxy: Array, size: tuple[int, int]) -> jax.Array:
    """Boxes of images, resized: bilinear between the centres of pixels, antialiased where it shrinks.

    Of a box of whole pixels it is torchvision's `resized_crop` with `antialias=True`. The resize of an axis is linear,
    so the whole is two matrix products.

    Args:
      image: float32 [B, H, W, 3].
      boxes_xyxy: float32 [B, V, 4], shares of the image. One without an area, or outside of the image, gives zeros.
      size: height and width of the result.

    Returns:
      float32 [B, V, *size, 3].
    """
    product = lambda equation, a, b: jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
    x1, y1, x2, y2 = jnp.moveaxis(boxes_xyxy.astype(jnp.float32), -1, 0)
    down = _resize_weights(y1, y2, image.shape[1], size[0])
    across = _resize_weights(x1, x2, image.shape[2], size[1])
    lines = product("bvyh,bhwc->bvywc", down, image.astype(jnp.float32))
    return product("bvxw,bvywc->bvyxc", across, lines)


def _resize_weights(start: jax.Array, end: jax.Array, pixels: int, size: int) -> jax.Array:
    """The share of each of the pixels in each of `size` parts from `start` to `end`, [B, V]: [B, V, size, pixels]."""
    start, end = start[..., None, None] * pixels, end[..., None, None] * pixels
    step = (end - start) / size
    centres = start + (np.arange(size, dtype=np.float32)[:, None] + 0.5) * step
    places = np.arange(pixels, dtype=np.float32) + 0.5
    hats = jnp.maximum(0, 1 - jnp.abs(places - centres) / jnp.maximum(step, 1))
    # A view shows its own pixels alone, also at its edges.
    inside = (places + 0.5 > start + _TOUCHED) & (places - 0.5 < end - _TOUCHED)
    hats = jnp.where(inside, hats, 0)
    return hats / jnp.maximum(hats.sum(-1, keepdims=True), 1e-6)


def _coloured(image: jax.Array, draws: _Draws, config: config_lib.Views) -> jax.Array:
    """[B, V, S, S, 3] in [0, 1], as by torchvision's adjust_brightness, _contrast and _saturation, in this order."""
    of_view = lambda x: x[..., None, None, None]
    factor = lambda drawn, most: of_view(1 + most * (2 * drawn - 1))
    mix = lambda factor, image, other: jnp.clip(factor * image + (1 - factor) * other, 0, 1)
    image = mix(factor(draws.brightness, config.brightness), image, 0)
    mean = _grey(image).mean((-3, -2, -1), keepdims=True)
    image = mix(factor(draws.contrast, config.contrast), image, mean)
    image = mix(factor(draws.saturation, config.saturation), image, _grey(image))
    return jnp.where(of_view(draws.grey < config.grey_rate), _grey(image), image)


def _grey(image: jax.Array) -> jax.Array:
    return jnp.sum(image * _GREY, -1, keepdims=True)


def to_view(boxes_xyxy: Array, view: View) -> jax.Array:
    """Boxes of the image as shares of each of its views.

    Args:
      boxes_xyxy: float32 [B, R, 4].
      view: of the images.

    Returns:
      float32 [B, V, R, 4]; parts outside of the view are below 0 or above 1.
    """
    corner, sides = _corner_and_sides(view)
    return _mirrored((boxes_xyxy[:, None] - corner) / sides, view)


def to_image(boxes_xyxy: Array, view: View) -> jax.Array:
    """The inverse: boxes of each view, float32 [B, V, R, 4], as shares of the image."""
    corner, sides = _corner_and_sides(view)
    return _mirrored(boxes_xyxy, view) * sides + corner


def share_inside(boxes_xyxy: Array, view: View) -> jax.Array:
    """The share of the area of each box of the image, [B, R, 4], that each view shows: [B, V, R]; 0 of no area."""
    low, high = jnp.split(boxes_xyxy[:, None], 2, -1)
    view_low, view_high = jnp.split(view.boxes_xyxy[:, :, None], 2, -1)
    common = jnp.maximum(jnp.minimum(high, view_high) - jnp.maximum(low, view_low), 0).prod(-1)
    area = (high - low).prod(-1)
    return jnp.where(area > 0, common / jnp.where(area > 0, area, 1), 0)


def _corner_and_sides(view: View) -> tuple[jax.Array, jax.Array]:
    """The left upper corner and the sides of each view, both twice, [B, V, 1, 4]."""
    low, high = jnp.split(view.boxes_xyxy[:, :, None], 2, -1)
    return jnp.concatenate([low, low], -1), jnp.concatenate([high - low] * 2, -1)


def _mirrored(boxes_xyxy: jax.Array, view: View) -> jax.Array:
    """Boxes [B, V, R, 4] of a view, left and right changed where it is mirrored."""
    x1, y1, x2, y2 = jnp.moveaxis(boxes_xyxy, -1, 0)
    turned = jnp.stack([1 - x2, y1, 1 - x1, y2], -1)
    return jnp.where(view.flipped[:, :, None, None], turned, boxes_xyxy)


def normalised(image01: Array, tower: config_lib.ImageTower) -> jax.Array:
    """Images in [0, 1], float32 [..., 3], as the input of an image tower: by its `pixel_mean` and `pixel_std`."""
    mean, std = (np.array(x, np.float32) for x in (tower.pixel_mean, tower.pixel_std))
    return (image01 - mean) / std
