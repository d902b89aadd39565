"""Colours: the RGB of the colour words, and the shades that a coloured part is drawn in."""

import random

COLOURS = {
    "red": (222, 44, 48),
    "orange": (248, 138, 28),
    "yellow": (255, 217, 48),
    "green": (52, 160, 70),
    "blue": (44, 112, 222),
    "purple": (134, 66, 184),
    "pink": (250, 142, 186),
    "white": (250, 248, 242),
    "black": (46, 44, 54),
    "brown": (136, 82, 44),
}
# Colours of the body, which no description mentions; they differ by image, not by species.
BODY_COLOURS = (
    (164, 168, 178),
    (196, 172, 138),
    (158, 152, 116),
    (122, 134, 150),
    (216, 202, 178),
    (172, 148, 136),
)


def mix(first, second, share: float) -> tuple[int, int, int]:
    """The colour that is `share` of the way from `first` to `second`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def vary(rgb, rng: random.Random, share: float) -> tuple[int, int, int]:
    """`rgb` with each channel moved by up to `share` of 255."""
    return tuple(min(255, max(0, round(value + 255 * rng.uniform(-share, share)))) for value in rgb)


def tones(rgb) -> dict[str, tuple[int, int, int]]:
    """The shades of a part: base, light, dark, ink (its outline), accent (its pattern)."""
    lightness = (3 * rgb[0] + 6 * rgb[1] + rgb[2]) / 10
    return {
        "base": rgb,
        "light": mix(rgb, (255, 255, 255), 0.34),
        "dark": mix(rgb, (40, 30, 60), 0.24),
        "ink": mix(rgb, (30, 22, 40), 0.72),
        "accent": (44, 40, 52) if lightness > 105 else (250, 246, 232),
        "eye": (24, 22, 30),
        "glint": (255, 255, 255),
    }
