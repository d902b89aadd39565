"""Further views of the images of a batch, made on the devices: random crops, mirrored, in other colours.

One global view and `local` small ones of each image, by `input.views`. Everything that is drawn is a function of the
key of the image and the number of the view alone, so micro-batches and meshes agree, and view i is the same whatever
number of views is asked for. Of images in their own shape the global view is the whole image in its own shape, and a
local one is a square. docs/method.md, Views.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.core.schema import Array, Patches
from grain_jax.models import placement
from grain_jax.models import places as places_lib

_GREY = np.array((0.2989, 0.587, 0.114), np.float32)  # of ITU-R BT.601, as torchvision rounds them
_TOUCHED = 1e-3  # of a pixel inside the crop, below which rounding alone put it there


class View(NamedTuple):
    """V views of each image of a batch."""

    # float32 [B, V, S, S, 3] in [0, 1]; Patches of these with axes [B, V], the global view of images in their own shape
    image: Any
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


def make(image: Array | Patches, keys: Array, config: config_lib.Views) -> Views | None:
    """The views of images.

    Args:
      image: uint8 [B, H, W, 3], or float32 in [0, 1]; or Patches of these.
      keys: PRNG keys [B] of the images.
      config: `input.views`.

    Returns:
      None where `config.local` is 0.

    Raises:
      UserError: a global view that is a crop, of images in their own shape.
    """
    if not config.local:
        return None
    image = as_floats(image)
    drawn = _drawn(keys, 1 + config.local)
    first, rest = (_Draws(*parts) for parts in zip(*(jnp.split(x, [1], 1) for x in drawn)))
    if isinstance(image, Patches):
        whole = _whole(image, first, config)
    else:
        whole = _view(image, first, image.shape[1:3], (config.global_min_area, 1.0), config)
    areas = config.min_area, config.max_area
    return Views(whole, _view(image, rest, (config.size, config.size), areas, config))


def as_floats(image: Any) -> Any:
    """Images, or Patches, of uint8 as float32 in [0, 1]; those of float32 stay."""
    if isinstance(image, Patches):
        return image._replace(pixels=as_floats(image.pixels))
    return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image


def _drawn(keys: jax.Array, views: int) -> _Draws:
    count = len(_Draws._fields)
    of_view = lambda key, view: jax.random.uniform(jax.random.fold_in(key, view), (count,))
    of_image = jax.vmap(of_view, (None, 0))
    return _Draws(*jnp.moveaxis(jax.vmap(of_image, (0, None))(keys, jnp.arange(views)), -1, 0))


def _whole(image: Patches, draws: _Draws, config: config_lib.Views) -> View:
    """The global view of images in their own shape."""
    if config.global_min_area < 1:
        raise errors.UserError(
            f"input.views.global_min_area: got {config.global_min_area}, expected 1 of images in their own shape, whose global"
            " view is whole"
        )
    flipped = draws.mirror < config.flip_rate
    images, patches, size = image.pixels.shape
    side, at = _side(image), places_lib.of_grid(image.grid, patches)
    pixels = image.pixels.reshape(images, patches, side, side, 3)
    columns = image.grid[:, 1:]
    mirrored = at.yx[..., 0] * columns + columns - 1 - at.yx[..., 1]
    turned = jnp.take_along_axis(pixels, mirrored[..., None, None, None], axis=1)[..., ::-1, :]
    pixels = jnp.where(flipped[..., None, None, None], turned, pixels)
    pixels = pixels.reshape(images, 1, patches, side * side, 3)  # as one image of lines
    real = at.mask[:, None, :, None, None]
    coloured = jnp.where(real, _coloured(pixels, draws, config, real), 0)
    coloured = placement.by_batch(coloured.reshape(images, 1, patches, size))
    boxes = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (images, 1, 4))
    return View(Patches(coloured, image.grid[:, None]), boxes, flipped)


def _side(image: Patches) -> int:
    """Pixels of a patch along each side."""
    return math.isqrt(image.pixels.shape[-1] // 3)


def _view(
    image: Array | Patches,
    draws: _Draws,
    size: tuple[int, int],
    areas: tuple[float, float],
    config: config_lib.Views,
) -> View:
    flipped = draws.mirror < config.flip_rate
    boxes = _places(draws, *areas, config.max_aspect, _stretch(image))
    # Of least area 1 the only place is the whole image, and its resize to its own size is itself.
    if areas[0] == 1 and not isinstance(image, Patches) and size == image.shape[1:3]:
        seen = image[:, None]
    else:
        seen = crops(image, boxes, size)
    seen = jnp.where(flipped[..., None, None, None], seen[..., ::-1, :], seen)
    return View(placement.by_batch(_coloured(seen, draws, config)), boxes, flipped)


def _stretch(image: Array | Patches) -> jax.Array | None:
    """The logarithm of height / width of images in their own shape, [B, 1]: the aspect of a square part as shares of them."""
    if not isinstance(image, Patches):
        return None
    rows, columns = jnp.split(jnp.log(jnp.maximum(image.grid, 1).astype(jnp.float32)), 2, axis=1)
    return rows - columns


def _places(
    draws: _Draws, least: float, most: float, max_aspect: float, stretch: jax.Array | None
) -> jax.Array:
    """Boxes in the image, xyxy [B, V, 4]: the area is uniform, the logarithm of the aspect as well.

    The ratio of the sides stays so near to 1, or to that of a square in an image of its own shape, that a box of the area
    fits into the image.
    """
    area = least + (most - least) * draws.area
    limit = jnp.minimum(np.float32(np.log(max_aspect)), -jnp.log(area))
    aspect = limit * (2 * draws.aspect - 1)
    if stretch is not None:
        aspect = jnp.clip(aspect + stretch, jnp.log(area), -jnp.log(area))
    aspect = jnp.exp(aspect)
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], -1), 1)
    corner = jnp.stack([draws.left, draws.top], -1) * (1 - sides)
    return jnp.concatenate([corner, jnp.minimum(corner + sides, 1)], -1)


def crops(image: Array | Patches, boxes_xyxy: Array, size: tuple[int, int]) -> jax.Array:
    """Boxes of images, resized: bilinear between the centres of pixels, antialiased where it shrinks.

    Of a box of whole pixels it is torchvision's `resized_crop` with `antialias=True`. The resize of an axis is linear,
    so the whole is two matrix products.

    Args:
      image: float32 [B, H, W, 3], or Patches of these.
      boxes_xyxy: float32 [B, V, 4], shares of the image. One without an area, or outside of the image, gives zeros.
      size: height and width of the result.

    Returns:
      float32 [B, V, *size, 3].
    """
    if isinstance(image, Patches):
        # A view after the other: the lines of one are as many as its pixels of all patches.
        of_view = lambda boxes: _crop_of_patches(image, boxes, size)
        return jnp.moveaxis(jax.lax.map(of_view, jnp.moveaxis(boxes_xyxy, 1, 0)), 0, 1)
    x1, y1, x2, y2 = jnp.moveaxis(boxes_xyxy.astype(jnp.float32), -1, 0)
    rows, columns = image.shape[1:3]
    down = _resize_weights(y1, y2, rows, np.arange(rows), size[0])
    across = _resize_weights(x1, x2, columns, np.arange(columns), size[1])
    lines = _product("bvyh,bhwc->bvywc", down, image.astype(jnp.float32))
    return _product("bvxw,bvywc->bvyxc", across, lines)


_COLUMNS = 32  # of a crop of patches that are made at a time


def _crop_of_patches(image: Patches, box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """A box [B, 4] of each image, float32 [B, *size, 3]; the weight of a pixel is that of its row by that of its column."""
    images, patches, _ = image.pixels.shape
    side, at = _side(image), places_lib.of_grid(image.grid, patches)
    pixels = image.pixels.astype(jnp.float32).reshape(images, patches, side, side, 3)
    real = jnp.repeat(at.mask, side, axis=1)[:, None]

    def weights(axis, start, end):
        lines = (at.yx[..., axis, None] * side + np.arange(side)).reshape(images, 1, -1)
        count = image.grid[:, axis, None, None] * side
        found = _resize_weights(start, end, count, lines, size[axis], real)
        return found.reshape(images, size[axis], patches, side)

    x1, y1, x2, y2 = jnp.moveaxis(box.astype(jnp.float32), -1, 0)
    down, across = weights(0, y1, y2), weights(1, x1, x2)

    def columns(part):
        lines = _product("btnx,bnyxc->bnytc", part, pixels)
        return _product("bsny,bnytc->bstc", down, lines)

    parts = across.reshape(images, -1, math.gcd(size[1], _COLUMNS), patches, side)
    found = jax.lax.map(columns, jnp.moveaxis(parts, 1, 0))  # [parts, B, height, columns, 3]
    return jnp.moveaxis(found, 0, 2).reshape(images, *size, 3)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


def _resize_weights(start, end, pixels, at, size: int, real=None) -> jax.Array:
    """The share of pixels of a line in each of `size` parts from `start` to `end`, [...] each: [..., size, n].

    Args:
      start, end: as shares of the line.
      pixels: of the line; a number, or [..., 1, 1].
      at: the numbers of n pixels, [n] or [..., 1, n]: all of the line, or each of them equally often.
      size: of the result.
      real: bool [..., 1, n], the pixels that count; None: all, once each.
    """
    start, end = start[..., None, None] * pixels, end[..., None, None] * pixels
    step = (end - start) / size
    centres = start + (np.arange(size, dtype=np.float32)[:, None] + 0.5) * step
    places = at + np.float32(0.5)
    hats = jnp.maximum(0, 1 - jnp.abs(places - centres) / jnp.maximum(step, 1))
    # A view shows its own pixels alone, also at its edges.
    inside = (places + 0.5 > start + _TOUCHED) & (places - 0.5 < end - _TOUCHED)
    times = 1.0
    if real is not None:
        inside &= real
        times = jnp.maximum(real.sum(-1, keepdims=True) / jnp.maximum(pixels, 1), 1)
    hats = jnp.where(inside, hats, 0)
    return hats / jnp.maximum(hats.sum(-1, keepdims=True) / times, 1e-6)


def _coloured(
    image: jax.Array, draws: _Draws, config: config_lib.Views, real: jax.Array | None = None
) -> jax.Array:
    """[B, V, S, S, 3] in [0, 1], as by torchvision's adjust_brightness, _contrast and _saturation, in this order.

    `real` are the pixels that count in the mean, bool of a shape that broadcasts; None: all.
    """
    of_view = lambda x: x[..., None, None, None]
    factor = lambda drawn, most: of_view(1 + most * (2 * drawn - 1))
    mix = lambda factor, image, other: jnp.clip(factor * image + (1 - factor) * other, 0, 1)
    image = mix(factor(draws.brightness, config.brightness), image, 0)
    mean = _grey(image).mean((-3, -2, -1), keepdims=True, where=real)
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


def normalised(image01: Any, tower: config_lib.ImageTower) -> Any:
    """Images in [0, 1], float32 [..., 3] or Patches, as the input of an image tower: by its `pixel_mean`, `pixel_std`."""
    mean, std = (np.array(x, np.float32) for x in (tower.pixel_mean, tower.pixel_std))
    if isinstance(image01, Patches):
        times = image01.pixels.shape[-1] // 3
        mean, std = np.tile(mean, times), np.tile(std, times)
        return image01._replace(pixels=(image01.pixels - mean) / std)
    return (image01 - mean) / std
