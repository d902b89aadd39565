"""The perch of the bird, and other things in the image; no description mentions them."""

# Coordinates read better in rows.
# fmt: off
import numpy as np

from grain_jax.data.aviary.outlines import curve, ellipse, grow, place, polygon, stroke
from grain_jax.data.aviary.palette import COLOURS, mix, tones, vary

PERCHES = {"branch": "on a branch", "stone": "on a stone", "post": "on a wooden post",
           "mound": "on a grassy mound"}
_WOOD = ((132, 96, 70), (112, 88, 76), (150, 114, 82))
_STONE = ((152, 150, 152), (134, 136, 146), (168, 158, 146))
_GRASS = ((116, 166, 78), (140, 176, 88), (98, 152, 90))
_LEAF = (112, 168, 84)


def _flower():
    petals = [ellipse(5.2 * np.cos(a), 5.2 * np.sin(a) - 4, 3.7, count=14)
              for a in np.linspace(0, 2 * np.pi, 6)[:-1] - np.pi / 2]
    return [(stroke([(0, -2), (0.8, 8), (-0.5, 22)], 1.5), "green"),
            (curve((0, 14), (4, 8.5), (8, 8), (5.5, 13), steps=4), "green"),
            *((grow(shape, 0.6), "ink") for shape in petals), *((shape, "base") for shape in petals),
            (ellipse(0, -4, 2.9, count=14), "yolk")]


def _butterfly():
    wings = [ellipse(x, y, rx, ry, angle) for x, y, rx, ry, angle in
             ((-4.6, -3, 5.4, 4, 40), (4.6, -3, 5.4, 4, -40), (-3.6, 3.6, 3.9, 3, -35),
              (3.6, 3.6, 3.9, 3, 35))]
    return [*((grow(shape, 0.6), "ink") for shape in wings), *((shape, "base") for shape in wings),
            *((ellipse(x, -3.4, 1.4, count=10), "light") for x in (-5.4, 5.4)),
            (ellipse(0, 0, 1.1, 5.4), "ink"),
            *((stroke([(0, -4.5), (s * 1.4, -7.5), (s * 3.2, -8.8)], 0.7), "ink") for s in (-1, 1))]


def _leaf():
    blade = curve((-8, 3), (-4, -3.4), (4, -4.4), (9, -3), (5, 2.4), (-2, 4.6))
    return [(grow(blade, 0.7), "ink"), (blade, "base"),
            (stroke([(-11, 5), (-5, 1), (6, -2.4)], 0.9), "dark")]


def _balloon():
    bulb = curve((0, -9), (6, -6.5), (7.3, 0), (4, 6), (0, 9), (-4, 6), (-7.3, 0), (-6, -6.5))
    return [(stroke([(0, 9), (1.6, 14), (-1, 19), (0.6, 24)], 0.7), "ink"),
            (grow(bulb, 0.7), "ink"), (bulb, "base"), (ellipse(-2.6, -4, 1.6, 2.8, 24), "light")]


def _mushroom():
    cap = curve((-10, 1), (-7, -6.5), (0, -9.4), (7, -6.5), (10, 1), (0, 2.6))
    foot = curve((-2.6, 0), (2.6, 0), (3.4, 10), (-3.4, 10), steps=4)
    return [(grow(foot, 0.7), "ink"), (foot, "cream"), (grow(cap, 0.7), "ink"), (cap, "base"),
            *((ellipse(x, y, r, count=10), "light") for x, y, r in
              ((-4.6, -2.6, 1.6), (1, -5.2, 1.9), (5.2, -1.6, 1.4)))]


def _sign():
    board = polygon((-9, -9), (7, -9), (11, -4.5), (7, 0), (-9, 0))
    return [(stroke([(0, -2), (0, 22)], 2.4), "wood"), (grow(board, 0.7), "ink"), (board, "base"),
            *((stroke([(-6, y), (5, y)], 1), "dark") for y in (-6, -3))]


def _berries():
    fruit = [ellipse(x, y, 3.1, count=16) for x, y in ((-3.6, 2), (3.4, 1), (0, 6.4))]
    return [*((stroke([(0, -7), (x / 2, -2), (x, y)], 0.9), "wood") for x, y in
              ((-3.6, 1), (3.4, 0), (0, 5))),
            (curve((0, -7), (5, -9.4), (10, -7), (5, -4.6), steps=4), "green"),
            *((grow(shape, 0.6), "ink") for shape in fruit), *((shape, "base") for shape in fruit),
            *((shape * 0.35 + (x * 0.65 - 0.8, y * 0.65 - 0.9), "light") for shape, (x, y) in
              zip(fruit, ((-3.6, 2), (3.4, 1), (0, 6.4)), strict=True))]


def _stripes_of_kite():
    body = polygon((0, -10), (7, -2), (0, 10), (-7, -2))
    return [(stroke([(0, 9), (3, 14), (-2, 18), (2, 23)], 0.8), "ink"), (grow(body, 0.7), "ink"),
            (body, "base"), (polygon((0, -10), (7, -2), (0, -2)), "light"),
            (polygon((0, 10), (-7, -2), (0, -2)), "dark")]


# kind -> (layers, whether it stands on the ground)
THINGS = {"flower": (_flower(), True), "mushroom": (_mushroom(), True), "sign": (_sign(), True),
          "butterfly": (_butterfly(), False), "leaf": (_leaf(), False),
          "balloon": (_balloon(), False), "kite": (_stripes_of_kite(), False),
          "berry twig": (_berries(), False)}
# Where things may stand, seen from the middle of the image, for a bird that looks towards +x.
_ON_GROUND = ((-33, 27), (35, 24), (-18, 32))
_IN_AIR = ((-32, -31), (37, -37), (-38, -14), (38, 16))


def draw_things(canvas, rng, scene, *, side) -> None:
    """Draws the other things of the scene behind the bird, which looks towards `side` (1 or -1)."""
    spots = {True: list(_ON_GROUND), False: list(_IN_AIR)}
    for kind, colour in scene.things:
        layers, on_ground = THINGS[kind]
        x, y = spots[on_ground].pop(rng.randrange(len(spots[on_ground])))
        position = (50 + side * (x + rng.uniform(-3, 3)), 50 + y + rng.uniform(-3, 3))
        angle, scale = rng.uniform(-12, 12), rng.uniform(0.75, 1.05)
        shades = {**tones(vary(COLOURS[colour], rng, 0.04)), "green": vary(_LEAF, rng, 0.04),
                  "wood": _WOOD[0], "yolk": (250, 214, 92), "cream": (244, 234, 214)}
        if colour == "yellow":
            shades["yolk"] = (190, 120, 60)
        for points, tone in layers:
            canvas.polygon(place(points, *position, angle, scale), shades[tone])


def draw_perch(canvas, rng, scene, *, feet, side) -> None:
    """Draws the perch, below the point `feet` (x, y)."""
    {"branch": _branch, "stone": _stone, "post": _post, "mound": _mound}[scene.perch](
        canvas, rng, *feet, side)


def _solid(canvas, points, shades):
    canvas.polygon(grow(points, 0.9), shades["ink"])
    canvas.polygon(points, shades["dark"])
    canvas.polygon(grow(points, -0.9) + (0, -0.8), shades["base"])


def _branch(canvas, rng, x, y, side):
    shades = tones(vary(rng.choice(_WOOD), rng, 0.03))
    slope, thick = rng.uniform(-0.07, 0.07), rng.uniform(5.5, 7)
    start, end = (x - 70 * side, y + 2.6 - 70 * slope), (x + 60 * side, y + 2.6 + 60 * slope)
    bend = rng.uniform(-3, 3)
    line = [start, (x - 30 * side, y + 2.6 - 30 * slope + bend), (x, y + 2.6),
            (x + 30 * side, y + 2.6 + 30 * slope), end]
    twig_at, twig = rng.uniform(24, 34), rng.choice((-1, 1))
    base = (x + twig_at * side, y + 2.6 + twig_at * slope)
    tip = (base[0] + 13 * side, base[1] + 11 * twig)
    for blade in (curve(tip, (tip[0] + 4, tip[1] - 4), (tip[0] + 10, tip[1] - 3),
                        (tip[0] + 4, tip[1] + 2), steps=4),
                  curve(tip, (tip[0] - 3, tip[1] + 3.5), (tip[0] - 2, tip[1] + 10),
                        (tip[0] + 2.6, tip[1] + 4.5), steps=4)):
        canvas.polygon(grow(blade, 0.6), mix(_LEAF, (30, 22, 40), 0.6))
        canvas.polygon(blade, _LEAF)
    canvas.polygon(stroke([base, tip], 3.4, 1.6), shades["ink"])
    canvas.polygon(stroke([base, tip], 2, 0.8), shades["dark"])
    _solid(canvas, stroke(line, thick, thick * 0.55), shades)
    for _ in range(3):
        position = rng.uniform(-45, 45)
        knot = (x + position, y + 2.9 + position * side * slope)
        canvas.polygon(stroke([knot, (knot[0] + 5, knot[1] + 5 * side * slope)], 0.8),
                       shades["dark"])


def _stone(canvas, rng, x, y, side):
    shades = tones(vary(rng.choice(_STONE), rng, 0.03))
    wide = rng.uniform(26, 34)
    top = y - 0.6
    rock = curve((x - wide * 0.75, top + 4), (x - 8, top), (x + 12, top + 0.4),
                 (x + wide * 0.8, top + 6), (x + wide, 106), (x - wide, 106))
    _solid(canvas, rock, shades)
    canvas.polygon(curve((x - wide * 0.6, top + 4.2), (x - 8, top + 1.2), (x + 2, top + 1.6),
                         (x - 8, top + 4.4)), shades["light"])
    for _ in range(4):
        canvas.polygon(ellipse(x + rng.uniform(-0.7, 0.7) * wide, top + rng.uniform(6, 22),
                               rng.uniform(0.7, 1.6), count=10), shades["dark"])


def _post(canvas, rng, x, y, side):
    shades = tones(vary(rng.choice(_WOOD), rng, 0.03))
    half = rng.uniform(12, 15)
    _solid(canvas, polygon((x - half, y), (x + half, y), (x + half, 108), (x - half, 108)), shades)
    canvas.polygon(curve((x - half, y + 0.6), (x, y - 2.4), (x + half, y + 0.6), (x, y + 3.4)),
                   shades["light"])
    for position in (-0.5, 0.1, 0.6):
        bend = rng.uniform(-1, 1)
        canvas.polygon(stroke([(x + position * half, y + 5), (x + position * half + bend, y + 14),
                               (x + position * half, 106)], 0.8), shades["dark"])


def _mound(canvas, rng, x, y, side):
    shades = tones(vary(rng.choice(_GRASS), rng, 0.03))
    hill = curve((x - 75, y + 12), (x - 35, y + 4), (x, y), (x + 35, y + 4), (x + 75, y + 12),
                 (x + 75, 125), (x - 75, 125))
    for _ in range(16):
        position = rng.uniform(-42, 42)
        root = y + 1.6 + (position / 33) ** 2 * 3.4
        blade = polygon((x + position - 1.3, root + 2), (x + position + rng.uniform(-3, 3),
                                                  root - rng.uniform(3, 7)),
                        (x + position + 1.3, root + 2))
        canvas.polygon(blade, shades[rng.choice(("base", "dark", "light"))])
    canvas.polygon(hill, shades["dark"])
    canvas.polygon(hill + (0, 1.6), shades["base"])
