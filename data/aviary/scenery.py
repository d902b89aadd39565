"""The scene of an image, in words and as a softly blurred background."""

import dataclasses
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from grain_jax.data.aviary import props
from grain_jax.data.aviary.palette import COLOURS, mix, vary

_DETAIL = 80  # side of the background before it is blurred and resized

# kind -> (sky above, sky below, places, backgrounds)
# fmt: off
_KINDS = {
    "sky": ((112, 178, 232), (214, 236, 250),
        ("in our town", "over the hill"), ("a blue sky", "a sky with clouds")),
    "lake": ((150, 200, 232), (226, 238, 242),
        ("near the lake", "at the shore"), ("still water", "a calm lake")),
    "meadow": ((156, 208, 240), (236, 244, 226),
        ("in the meadow", "in a field"), ("a green meadow", "open grass")),
    "forest": ((168, 200, 150), (206, 224, 176),
        ("in the forest", "among the trees"), ("soft leaves", "a quiet forest")),
    "sunset": ((236, 158, 132), (252, 224, 176),
        ("in the evening", "after a long day"), ("a warm sunset", "an evening sky")),
    "reeds": ((184, 212, 216), (232, 236, 214),
        ("in the reeds", "at the pond"), ("tall reeds", "reeds by a pond")),
    "hills": ((164, 192, 224), (232, 232, 240),
        ("in the hills", "on a walk up the hills"), ("far hills", "misty hills")),
    "snow": ((186, 206, 228), (236, 242, 250),
        ("in the snow", "on a winter day"), ("fresh snow", "a winter field")),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Scene:
    """The surroundings: `place` ("near the lake") and `background` ("still water") in words, the
    kind of `perch` (a key of props.PERCHES), and other `things` as (kind, colour)."""

    place: str
    background: str
    perch: str
    things: tuple[tuple[str, str], ...]

    @property
    def perch_phrase(self) -> str:
        """E.g. "on a branch"."""
        return props.PERCHES[self.perch]

    @property
    def thing_phrases(self) -> list[str]:
        """E.g. ["a pink flower"]."""
        return [
            ("an " if colour[0] in "aeiou" else "a ") + f"{colour} {kind}" for kind, colour in self.things
        ]


def make_scene(rng: random.Random, size: int) -> tuple[Scene, Image.Image]:
    """A scene, and its background as an RGB image of that size."""
    kind = rng.choice(tuple(_KINDS))
    above, below, places_named, backgrounds = _KINDS[kind]
    image = _background(kind, vary(above, rng, 0.05), vary(below, rng, 0.03), rng)
    scene = Scene(
        place=rng.choice(places_named),
        background=rng.choice(backgrounds),
        perch=rng.choice(("branch", "branch", "branch", "stone", "post", "mound")),
        things=tuple(
            (rng.choice(tuple(props.THINGS)), rng.choice(tuple(COLOURS)))
            for _ in range(rng.choice((0, 1, 1, 2, 2)))
        ),
    )
    return scene, image.resize((size, size), Image.Resampling.BICUBIC)


def _background(kind, above, below, rng):
    ramp = np.linspace(0, 1, _DETAIL)[:, None, None]
    sky = np.asarray(above) * (1 - ramp) + np.asarray(below) * ramp
    image = Image.fromarray(np.broadcast_to(sky, (_DETAIL, _DETAIL, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    _DRAW[kind](draw, rng, above, below)
    return image.filter(ImageFilter.GaussianBlur(1.1))


def _disc(draw, x, y, radius, rgb, flat=1.0):
    draw.ellipse((x - radius, y - radius * flat, x + radius, y + radius * flat), fill=rgb)


def _sun(draw, rng, x, y, radius, rgb, below):
    for ring in range(5, 0, -1):
        _disc(draw, x, y, radius * (1 + 0.24 * ring), mix(rgb, below, 0.16 * ring))
    _disc(draw, x, y, radius, rgb)


def _clouds(draw, rng, above, below, count=4, top=4, bottom=60):
    if rng.random() < 0.5:
        _sun(draw, rng, rng.uniform(8, 72), rng.uniform(8, 18), 6, (255, 246, 204), below)
    for _ in range(count):
        x, y, width = rng.uniform(0, 80), rng.uniform(top, bottom), rng.uniform(6, 11)
        for shade, drop in ((mix(above, (255, 255, 255), 0.55), 1.5), ((252, 253, 255), 0)):
            for dx, r in ((-1, 0.45), (-0.45, 0.7), (0.3, 0.85), (1, 0.5)):
                _disc(draw, x + dx * width, y + drop - r * 2, width * r * 0.75, shade, 0.62)


def _ridge(draw, rng, level, height, rgb, steps=5):
    """A hilly outline: everything below `level` +- `height`."""
    phase, bend = rng.uniform(0, 7), rng.uniform(0.5, 0.9)
    wave = lambda x: math.sin(phase + bend * x / 8)
    ripple = lambda x: math.sin(2 * phase + bend * x / 3.1)
    line = [(x, level + height * wave(x) + 0.4 * height * ripple(x)) for x in range(-2, 84, steps)]
    draw.polygon([(-2, 82), *line, (84, 82)], fill=rgb)


def _water(draw, rng, above, below):
    level = rng.uniform(38, 50)
    _ridge(draw, rng, level - 5, 3, mix((116, 150, 124), below, 0.35))
    draw.rectangle((0, level, 80, 80), fill=(126, 180, 208))
    for _ in range(16):
        x, y = rng.uniform(-8, 80), level + (80 - level) * rng.random() ** 0.7
        width = 3 + (y - level) * 0.4
        tint = mix((126, 180, 208), rng.choice(((240, 250, 252), (76, 132, 172))), 0.5)
        draw.rectangle((x, y, x + width, y + 0.6 + (y - level) / 40), fill=tint)


def _meadow(draw, rng, above, below):
    _clouds(draw, rng, above, below, count=2, bottom=26)
    _ridge(draw, rng, rng.uniform(40, 48), 2.5, (162, 198, 118))
    _ridge(draw, rng, rng.uniform(52, 60), 2.5, (134, 182, 98))
    _ridge(draw, rng, rng.uniform(64, 70), 2, (112, 164, 84))
    for _ in range(10):
        x, y, radius = rng.uniform(0, 80), rng.uniform(56, 78), rng.uniform(0.7, 1.3)
        tints = (250, 232, 130), (250, 250, 246), (240, 170, 190), (196, 164, 224)
        _disc(draw, x, y, radius, rng.choice(tints))


def _leaves(draw, rng, above, below):
    for _ in range(4):
        x, width = rng.uniform(0, 80), rng.uniform(2.5, 5)
        trunk = (x - width / 2, 80), (x - width / 3, 0), (x + width / 3, 0), (x + width / 2, 80)
        draw.polygon(trunk, fill=mix((126, 116, 92), below, 0.4))
    for _ in range(26):
        tints = (122, 170, 96), (164, 200, 118), (206, 226, 152), (96, 146, 92), (236, 238, 186)
        tint = mix(rng.choice(tints), below, 0.3)
        _disc(draw, rng.uniform(0, 80), rng.uniform(0, 80), rng.uniform(2, 6.5), tint)


def _low_sun(draw, rng, above, below):
    _sun(draw, rng, rng.uniform(10, 70), rng.uniform(22, 44), 8, (255, 240, 190), below)
    for _ in range(5):
        x, y, width = rng.uniform(-10, 70), rng.uniform(6, 50), rng.uniform(12, 26)
        draw.ellipse((x, y, x + width, y + 2.6), fill=mix(above, (255, 214, 190), 0.5))
    _ridge(draw, rng, rng.uniform(54, 60), 3, mix((150, 112, 140), below, 0.3))
    _ridge(draw, rng, rng.uniform(64, 70), 2.5, (122, 96, 126))


def _reeds(draw, rng, above, below):
    draw.rectangle((0, 58, 80, 80), fill=(150, 190, 194))
    for number in range(24):
        x, top = rng.uniform(-2, 82), rng.uniform(8, 44)
        lean = rng.uniform(-5, 5)
        tint = rng.choice(((140, 160, 92), (172, 176, 110), (112, 142, 92)))
        tint = mix(tint, below, 0.45 - 0.018 * number)
        draw.polygon([(x - 0.8, 82), (x + lean, top), (x + 0.8, 82)], fill=tint)
        if number % 4 == 0:
            box = (x + lean - 1.5, top - 1, x + lean + 1.5, top + 9)
            draw.ellipse(box, fill=mix((132, 96, 70), below, 0.25))


def _hills(draw, rng, above, below):
    _clouds(draw, rng, above, below, count=2, bottom=20)
    tints = (186, 198, 222), (160, 176, 202), (134, 158, 172), (124, 156, 130)
    for number, rgb in enumerate(tints):
        _ridge(draw, rng, 30 + 11 * number + rng.uniform(-3, 3), 6 - number, rgb, steps=3)


def _snow(draw, rng, above, below):
    for _ in range(5):
        x, y, r = rng.uniform(0, 80), rng.uniform(44, 52), rng.uniform(5, 8)
        fir = (x - r * 0.6, y), (x, y - 2.6 * r), (x + r * 0.6, y)
        draw.polygon(fir, fill=mix((118, 146, 142), below, 0.35))
    _ridge(draw, rng, rng.uniform(46, 52), 2, (232, 238, 246))
    _ridge(draw, rng, rng.uniform(60, 66), 2.5, (246, 249, 253))
    for _ in range(30):
        _disc(draw, rng.uniform(0, 80), rng.uniform(0, 80), rng.uniform(0.5, 1.1), (255, 255, 255))


_DRAW = dict(sky=_clouds, lake=_water, meadow=_meadow, forest=_leaves, sunset=_low_sun)
_DRAW |= dict(reeds=_reeds, hills=_hills, snow=_snow)
