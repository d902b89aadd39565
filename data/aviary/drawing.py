"""Draws a bird of a species in a scene: an image, the exact box of each part and the part of each pixel.

The foreground is drawn as polygons on a supersampled canvas of palette indices, which is then averaged down.
Every index belongs to one part (or none). Boxes enclose the visible pixels of a part, not its whole shape.
"""

import dataclasses
import functools
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from grain_jax.data.aviary import bird, props, scenery
from grain_jax.data.aviary.palette import BODY_COLOURS, COLOURS, tones, vary
from grain_jax.data.aviary.settings import DEFAULT, Pose
from grain_jax.data.aviary.species import Species
from grain_jax.data.aviary.vocabulary import PARTS


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A drawn image."""

    image: Image.Image  # RGB
    # Part -> the box of what can be seen of it, in pixels; a part out of sight is missing.
    boxes_xyxy: dict[str, tuple[float, float, float, float]]
    areas: dict[str, float]  # part -> the share of the image that it covers
    scene: scenery.Scene  # in words
    # uint8 [side, side] of the supersampled canvas: 0, or i for the i-th of PARTS
    labels: np.ndarray

    def part_mask(self) -> np.ndarray:
        """The label that covers most of each pixel, the lower one of two equal ones: uint8 [size, size]."""
        factor = len(self.labels) // self.image.height
        share = np.uint8(factor**2)  # so that the mean over a pixel is a count
        shown = [(self.labels == label) * share for label in range(len(PARTS) + 1)]
        covered = [np.asarray(Image.fromarray(label_map).reduce(factor)) for label_map in shown]
        return np.argmax(covered, 0).astype(np.uint8)


class _Canvas:
    """Polygons on a canvas of palette indices, 0 is see-through; units are hundredths of the side."""

    def __init__(self, size, supersampling):
        self.supersampling, self._side = supersampling, size * supersampling
        self._image = Image.new("P", (self._side, self._side), 0)
        self._draw = ImageDraw.Draw(self._image)
        self._indices = {((0, 0, 0), ""): 0}  # (colour, part) -> palette index, in their order

    def polygon(self, points, rgb, part=None):
        """Fills the outline `points` [n, 2]; its pixels belong to `part`."""
        index = self._indices.setdefault((rgb, part), len(self._indices))
        points = points * (self._side / 100)
        self._draw.polygon(points.ravel().tolist(), fill=index)

    def layer(self, light):
        """(colours on black, coverage): RGB and L images of the final size."""
        self._image.putpalette([value for rgb, _ in self._indices for value in rgb])
        colours = self._image.convert("RGB").reduce(self.supersampling)
        coverage = Image.fromarray((np.asarray(self._image) > 0).view(np.uint8) * np.uint8(255))
        return ImageChops.multiply(colours, light), coverage.reduce(self.supersampling)

    def visible(self):
        """`boxes_xyxy`, `areas` and `labels` of a Drawing."""
        numbers = [PARTS.index(part) + 1 if part else 0 for _, part in self._indices]
        # [side, side]: 0, or 1 + the part's index
        shown = np.array(numbers, np.uint8)[np.asarray(self._image)]
        boxes, areas = {}, {}
        for number, part in enumerate(PARTS, 1):
            mask = shown == number
            rows = np.flatnonzero(mask.any(1))
            if not len(rows):
                continue
            mask = mask[rows[0] : rows[-1] + 1]
            columns = np.flatnonzero(mask.any(0))
            edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            boxes[part] = tuple(float(edge) / self.supersampling for edge in edges)
            areas[part] = np.count_nonzero(mask) / self._side**2
        return boxes, areas, shown


def draw(species: Species, *, rng: random.Random, size: int = 64, pose: Pose = DEFAULT.pose) -> Drawing:
    """Draws one bird of `species`, `size` x `size` pixels; all random numbers come from `rng`.

    Every species draws the same number of them, so that another look of a part changes only that part.
    """
    supersampling = 4 if size <= 96 else 3 if size <= 256 else 2
    canvas = _Canvas(size, supersampling)
    mirrored = rng.random() < pose.mirrored
    scale = rng.uniform(pose.scale_from, pose.scale_to)
    angle = np.deg2rad(rng.uniform(-pose.turn, pose.turn))
    x, y = (50 + 100 * rng.uniform(-pose.shift, pose.shift) for _ in range(2))
    cos, sin = (0.96 * scale * turned for turned in (np.cos(angle), np.sin(angle)))
    side = -1 if mirrored else 1
    matrix = np.array([[side * cos, sin], [-side * sin, cos]])
    offset = np.array([x, y + 2.5])

    body = vary(rng.choice(BODY_COLOURS), rng, 0.04)
    shades = {None: tones(body)}
    for part in PARTS:
        shades[part] = tones(vary(COLOURS[species[part].colour], rng, pose.colour_variation))

    feet = np.array([3.5, bird.FOOT_Y[species["legs"].shape]]) @ matrix + offset
    scene, background = scenery.make_scene(rng, size)
    props.draw_things(canvas, rng, scene, side=side)
    props.draw_perch(canvas, rng, scene, feet=feet, side=side)
    for part, points, tone in bird.bird_layers(species):
        canvas.polygon(points @ matrix + offset, shades[part][tone], part)

    layer, coverage = canvas.layer(_light(size))
    hidden = ImageChops.invert(coverage)
    image = ImageChops.add(ImageChops.multiply(background, Image.merge("RGB", (hidden,) * 3)), layer)
    boxes, areas, labels = canvas.visible()
    return Drawing(image=image, boxes_xyxy=boxes, areas=areas, scene=scene, labels=labels)


@functools.lru_cache(maxsize=4)
def _light(size):
    """The brightness of the foreground, which is lit from above."""
    column = np.linspace(255, 222, size).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(column[:, None, None], (size, size, 3)).copy())
