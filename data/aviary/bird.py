"""The shapes of the bird, in hundredths of the side of the image; it looks towards +x, y is down.

A *layer* is (outline, tone); tones are names of shades made from one colour (see `drawing.tones`).
`PART_LAYERS[part, shape]` holds the layers of a part from back to front.
"""

# Coordinates read better in rows.
# fmt: off
import numpy as np

from grain_jax.data.aviary.outlines import bands, curve, ellipse, grow, place, polygon, spots, stroke

INK = 1.0  # width of outlines
EYE_AT = (18.0, -21.0)
_HEAD = ellipse(13.5, -18.5, 14.2, 13.6, count=36)
_TORSO = curve((3, -13), (-11, -6), (-25, 9), (-21, 18), (-7, 24.5), (11, 22.5), (23, 11),
               (26.5, -2), (25, -13), steps=8)
_BREAST = curve((25, -7), (26, 0), (23, 10), (12.5, 20.5), (-1, 23.5), (-5, 19), (0, 10), (5, 2),
                (13, -6))
_WING = place(curve((5, -7.5), (9.5, 1), (6, 10), (-6, 15.5), (-22, 18.5), (-34, 17), (-26, 9),
                    (-13, -4), (-4, -9)), -3.2, -0.6)


def _shaded(points, *inside, depth=1.2):
    """Layers: the outline, a darker lower rim, the colour, and the layers drawn over it."""
    return [(grow(points, INK), "ink"), (points, "dark"),
            (grow(points, -depth / 2) + (0, -depth / 2), "base"), *inside]


def _crest():
    spikes = [polygon((x0, -27), (tip, top), (x0 + 9, -27))
              for x0, tip, top in ((-1, -9.5, -40), (4, 1.5, -46), (10, 13.5, -46.5),
                                   (15, 24, -41))]
    tall = curve((7, -28), (1, -36), (-9, -44), (-15, -46), (-11, -49.5), (0, -47), (11, -39),
                 (18, -29))
    puff = [ellipse(x, y, r) for x, y, r in
            ((4, -35, 6.5), (20, -35, 6.5), (12, -40.5, 7.5), (12, -33, 8))]
    curl = stroke([(15, -27), (13, -38), (6, -45.5), (-3, -46.5), (-9, -42), (-8, -36.5),
                   (-3, -35.6), (-1.5, -39)], 7.8, 3)
    return {
        "spiky": [(grow(shape, INK), "ink") for shape in spikes] + [(shape, "base") for shape in spikes]
        + [(polygon((x, -30), (t, y + 4), (x + 2.2, -30)), "light")
           for x, t, y in ((3, -6.5, -40), (8, 2.5, -46), (13, 13.2, -46), (17, 21.5, -41))],
        "tall": _shaded(tall, (stroke([(11, -31), (5, -40), (-8, -47)], 1.4, 0.7), "dark"),
                        (stroke([(14, -31), (9, -40), (0, -45.5)], 1.2, 0.6), "light")),
        "round": [(grow(shape, INK), "ink") for shape in puff] + [(shape, "dark") for shape in puff]
        + [(grow(shape, -0.8) + (0, -0.8), "base") for shape in puff]
        + [(ellipse(10, -43, 3.2, 2, -20), "light")],
        "curled": [(grow(curl, INK), "ink"), (curl, "base"),
                   (stroke([(14, -31), (11.6, -38.6), (5, -44.6), (-2.5, -45.4)], 1.7, 0.8), "light")],
    }


def _beak():
    def bill(upper, gape):
        return _shaded(upper, (stroke(gape, 0.9, 0.5), "ink"), depth=1.6)
    return {
        "long": bill(curve((24, -24), (34, -20.5), (47, -17), (35, -15), (24, -14), steps=4),
                     [(25, -18.6), (35, -17.8), (45, -17)]),
        "short": bill(curve((23.5, -26), (31, -23.5), (37, -17.5), (31, -13), (23.5, -11.5),
                            steps=5), [(25, -17.8), (31, -17.2), (36, -17.2)]),
        "hooked": bill(curve((23.5, -25.5), (32, -26), (39.5, -21), (40.5, -10.5), (36.5, -15),
                             (31, -14.5), (23.5, -13), steps=5),
                       [(25, -17.5), (31, -16.8), (36, -16.6)]),
        "curved": bill(curve((23, -24.5), (33, -23), (42, -15), (45, -3), (39, -10), (32, -14.5),
                             (23.5, -14), steps=5),
                       [(25, -19), (33, -18), (40, -11.5), (43.6, -5.5)]),
    }


def _eye():
    x, y = EYE_AT
    ring = ellipse(x, y, 6.6, count=32)
    stripe = curve((27, -21), (22, -17.2), (10, -17.8), (0, -21.5), (1.5, -25.5), (10, -25.2),
                   (22, -25.2))
    patch = curve((24.5, -20), (21, -26), (14, -27.3), (5, -22), (4.5, -14), (12, -11.5),
                  (21, -15))
    return {
        "ring": [(grow(ring, 0.6), "ink"), (ring, "base")],
        "stripe": [(grow(stripe, 0.6), "ink"), (stripe, "base")],
        "patch": [(grow(patch, 0.6), "ink"), (patch, "base")],
    }


def _throat():
    patch = curve((25.5, -13.5), (27, -6), (24, 1.5), (16, 2.5), (11, -4), (15, -11.5))
    collar = curve((-2.5, -11), (6, -9.2), (17, -8.2), (26.5, -9.5), (26.5, -1.5), (17, 1.5),
                   (5, 0.5), (-6.5, -4.5))
    bib = curve((26, -12.5), (27, -4), (24.5, 4), (20, 10.5), (15.5, 4.5), (11.5, -2), (10, -8),
                (17, -11.5))
    return {"patch": _shaded(patch), "collar": _shaded(collar), "bib": _shaded(bib)}


def _breast():
    inner = grow(_BREAST, -0.6)
    return {
        "plain": _shaded(_BREAST, (ellipse(15, 2, 3.4, 6, 28), "light"), depth=1.6),
        "spotted": _shaded(_BREAST, *((shape, "accent") for shape in
                                      spots(_BREAST, 6.6, 1.75, -40)), depth=1.6),
        "striped": _shaded(_BREAST, *((shape, "accent") for shape in
                                      bands(inner, 5, 0.42, -40)), depth=1.6),
    }


def _wing():
    feathers = [(stroke(line, 0.5, 0.9), "dark") for line in
                ([(0, 9), (-10, 13), (-24, 16.4)], [(-2, 5), (-12, 9.2), (-27, 13.2)])]
    inner = grow(_WING, -0.6)
    tip = np.array([p for p in inner if p[0] < -15])
    light = (curve((3, -5), (-3, -5.5), (-12, 0), (-17, 5), (-8, 1.5), (2, -1)), "light")
    bars = [inner_band for inner_band in bands(inner, 5, 0.45, 62)[1:4]]
    return {
        "plain": _shaded(_WING, light, *feathers, depth=1.8),
        "barred": _shaded(_WING, *((shape, "accent") for shape in bars), depth=1.8),
        "spotted": _shaded(_WING, *((shape, "accent") for shape in spots(_WING, 7, 1.9, 30)),
                           depth=1.8),
        "tipped": _shaded(_WING, (tip, "accent"), light, depth=1.8),
    }


def _tail():
    def out(points):  # drawn along +x, then turned to hang behind the bird
        return place(points, -21, 11, 152)
    long = curve((0, -5), (12, -4.6), (26, -3.2), (31, 0), (26, 3.2), (12, 4.6), (0, 5))
    fork = polygon((0, -5.5), (12, -6), (27, -12.5), (16, -1), (15, 0), (16, 1), (27, 12.5),
                   (12, 6), (0, 5.5))
    fan = curve((0, -4), (10, -9), (20, -14), (25, -9), (26.5, -4.5), (27, 0), (26.5, 4.5),
                (25, 9), (20, 14), (10, 9), (0, 4))
    broad = curve((0, -5), (12, -6.4), (24, -7.6), (27, -6), (27, 6), (24, 7.6), (12, 6.4),
                  (0, 5))
    rays = [(out(stroke([(4, y / 4), (22, y)], 0.5, 0.9)), "dark") for y in (-8, -2.7, 2.7, 8)]
    stripes = [(out(shape), "accent") for shape in bands(grow(broad, -0.5), 5, 0.5, 90)]
    return {
        "long": _shaded(out(long), (out(stroke([(4, 0.4), (27, 0.4)], 0.7, 0.7)), "dark")),
        "forked": _shaded(out(fork)),
        "fanned": _shaded(out(fan), *rays),
        "striped": _shaded(out(broad), *stripes),
    }


def _legs():
    def leg(x, top, foot, width):
        toes = [stroke([(x, foot - 2.5), (x + dx, foot + dy)], width, width * 0.65)
                for dx, dy in ((5.2, 0.4), (2.2, 1.6), (-4.2, 0.4))]
        return [stroke([(x - 1.5, top), (x, foot - 1)], width), *toes]
    def both(top, foot, width):
        shapes = leg(-2.5, top, foot, width) + leg(9, top, foot, width)
        return [(grow(shape, 0.55), "ink") for shape in shapes] + [(shape, "base") for shape in shapes]
    def trouser(x):
        fluff = curve((x - 6, 19), (x - 6.3, 28), (x - 4, 34), (x - 1.5, 32.4), (x, 35),
                      (x + 1.8, 32.4), (x + 4, 34), (x + 5.6, 28), (x + 5.5, 18), steps=4)
        return _shaded(fluff)
    toes = [(shape, "dark") for x in (-2.5, 9) for shape in leg(x, 28, 36.5, 2.2)]
    return {
        "long": both(17, 41.5, 2.6),
        "short": both(19, 33.5, 5.0),
        "feathered": toes + trouser(-2.5) + trouser(9.5),
    }


PART_LAYERS = {
    (part, shape): layers
    for part, shapes in (("crest", _crest()), ("beak", _beak()), ("eye", _eye()),
                         ("throat", _throat()), ("breast", _breast()), ("wing", _wing()),
                         ("tail", _tail()), ("legs", _legs()))
    for shape, layers in shapes.items()
}
FOOT_Y = {"long": 41.0, "short": 33.5, "feathered": 36.0}
BODY_BACK = [(grow(_TORSO, INK), "ink"), (grow(_HEAD, INK), "ink"), (_TORSO, "dark"),
             (grow(_TORSO, -1) + (0.2, -1), "base"), (_HEAD, "base"),
             (ellipse(10.5, -25.5, 7, 4.2, -24), "light")]
EYE = [(ellipse(*EYE_AT, 4.0, count=20), "ink"), (ellipse(*EYE_AT, 3.3, count=20), "eye"),
       (ellipse(EYE_AT[0] + 1.1, EYE_AT[1] - 1.2, 1.15, count=10), "glint")]


def bird_layers(species):
    """Yields (part, outline, tone) from back to front; part is None for the body and the eye."""
    for part in ("tail", "legs", "crest", BODY_BACK, "breast", "throat", "eye", EYE, "beak", "wing"):
        if isinstance(part, str):
            yield from ((part, *layer) for layer in PART_LAYERS[part, species[part].shape])
        else:
            yield from ((None, *layer) for layer in part)
