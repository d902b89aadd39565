"""Things to draw: cut-outs with their phrases, which phrases are quiet, and how a scene is made of them."""

import collections
import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MOST_WORDS, LEAST_SIDE, LARGEST = 8, 24, 800  # of a phrase; of an image in memory, in pixels
MOST_OVERLAP = 0.15  # of the squares of two things, as a share of the smaller one
# "a bunch of grapes" has the head noun "grapes", "a box for trash" has "box".
_MEASURES = {"pair", "bunch", "head", "cup", "model", "baby", "plant", "quarter", "two"}
_AFTER_HEAD = re.compile(r"\b(for|with|in|on|from|that|used|resembles|inside|hatched|and|or)\b|,")
Spot = tuple[float, float, float]  # centre x, y and side of a square, as shares of the image


class Scene(NamedTuple):
    """What is drawn."""

    image: Image.Image
    boxes_xyxy: list[list[int]]  # in pixels
    mask: np.ndarray  # uint8 [H, W]: 1 + the position of the thing; 0: the place


def read(folder: pathlib.Path, exclude: str) -> dict[str, Image.Image]:
    """Images below `folder` by path without suffix; paths that the regular expression finds are left out."""
    images = {}
    for file in sorted(folder.rglob("*.*")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            if not (exclude and re.search(exclude, name)):
                images[name] = Image.open(file).convert("RGBA")
                images[name].thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return images


def cutouts(folder: pathlib.Path, exclude: str, least_colours: int) -> dict[str, dict[str, Image.Image]]:
    """The cut-outs of each phrase, by path: those of `read` with a text beside them, whose first line it is.

    A cut-out has `least_colours` or more, at 32 levels a channel: photographs have more than drawings.
    """
    by_phrase: dict[str, dict[str, Image.Image]] = collections.defaultdict(dict)
    for name, image in read(folder, exclude).items():
        text, pixels = folder / f"{name}.txt", np.asarray(image)
        visible = pixels[pixels[..., 3] > 128][:, :3].astype(int) >> 3
        colours = len(np.unique(visible @ [1024, 32, 1]))
        phrase = phrase_of(text.read_text("utf-8").partition("\n")[0]) if text.exists() else ""
        few_words = 1 <= len(phrase.split()) <= MOST_WORDS
        if few_words and colours >= least_colours and min(image.size) >= LEAST_SIDE:
            by_phrase[phrase][name] = image.crop(image.getchannel("A").getbbox())
    return dict(sorted(by_phrase.items()))


def phrase_of(text: str) -> str:
    """The first sentence, without brackets and full stop; a leading article is in lower case."""
    text = re.sub(r"\s*\([^)]*\)", "", text.strip())
    text = re.split(r"(?<=[a-z])[.!?—](?:\s|$|\w)", text)[0].strip(" .!?")
    return re.sub(r"^(An?|The|Some|Two)\b", lambda article: article[0].lower(), text)


def words_of(text: str) -> list[str]:
    """Words in lower case, plurals as singulars: roughly, since only equality counts."""
    return [re.sub(r"(?<=[^su])s$", "", word) for word in re.findall(r"[^\W\d_]+", text.lower())]


def head_of(phrase: str) -> str:
    """The head noun: the word that says what a thing is."""
    before, _, after = _AFTER_HEAD.split(phrase)[0].partition(" of ")
    words = words_of(before) or words_of(phrase)
    return words_of(after)[-1] if words[-1] in _MEASURES and after else words[-1]


def quiet_phrases(kinds: Mapping[str, str], count: int, rng: random.Random) -> set[str]:
    """At most `count` phrases whose head nouns no other phrase has, nor the kind that captions say instead.

    `kinds` has the kind of each phrase; one without a kind, "", cannot be quiet.
    """
    quiet = set[str]()
    for first in rng.sample(list(kinds), len(kinds)):
        group, heads = set[str](), {head_of(first)}
        while more := {x for x in kinds if heads & set(words_of(x))} - group:
            group |= more
            heads |= {head_of(x) for x in more}
        said = {word for x in group for word in words_of(kinds[x])}
        if all(kinds[x] for x in group) and not heads & said and len(quiet | group) <= count:
            quiet |= group
    return quiet


def listed(names: list[str]) -> str:
    """The names as in "a, b and c"."""
    return ", ".join(names[:-2] + [" and ".join(names[-2:])])


def background(rng: random.Random, place: Image.Image, size: int) -> Image.Image:
    """A square part of a place, perhaps mirrored."""
    side = int(min(place.size) * rng.uniform(0.5, 1))
    x, y = (rng.randint(0, edge - side) for edge in place.size)
    box = (x, y, x + side, y + side)
    part = place.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(part) if rng.random() < 0.5 else part


def layout(rng: random.Random, count: int, sides: tuple[float, float]) -> list[Spot]:
    """So many squares that overlap little; smaller than `sides` (shares of the image) if they do not fit."""

    def apart(a: Spot, b: Spot) -> bool:
        smaller = min(a[2], b[2])
        reach = ((a[2] + b[2]) / 2 - abs(a[axis] - b[axis]) for axis in (0, 1))
        width, height = (min(max(0, edge), smaller) for edge in reach)
        return width * height <= MOST_OVERLAP * smaller**2

    while True:
        sides = sides[0] * 0.999, sides[1] * 0.999
        edges = [rng.uniform(*sides) for _ in range(count)]
        spots = [(rng.uniform(s / 2, 1 - s / 2), rng.uniform(s / 2, 1 - s / 2), s) for s in edges]
        if all(apart(a, b) for i, a in enumerate(spots) for b in spots[:i]):
            return spots


def scene(
    rng: random.Random, ground: Image.Image, things: Sequence[Image.Image], spots: Sequence[Spot]
) -> Scene:
    """The cut-outs, each turned, perhaps mirrored, lighter or darker, in their squares."""
    image, mask, boxes_xyxy = ground.copy(), np.zeros(ground.size[::-1], np.uint8), []
    for number, (thing, (*centre, side)) in enumerate(zip(things, spots, strict=True), 1):
        thing = thing.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        thing = thing.crop(thing.getchannel("A").getbbox())
        thing = ImageOps.mirror(thing) if rng.random() < 0.5 else thing
        scale = side * image.width / max(thing.size)
        width, height = (max(3, round(edge * scale)) for edge in thing.size)
        thing = thing.resize((width, height), Image.Resampling.LANCZOS)
        x, y = (round(c * image.width - edge / 2) for c, edge in zip(centre, (width, height)))
        x, y = min(max(0, x), image.width - width), min(max(0, y), image.height - height)
        alpha = thing.getchannel("A")
        brightness = ImageEnhance.Brightness(thing.convert("RGB"))
        image.paste(brightness.enhance(rng.uniform(0.75, 1.25)), (x, y), alpha)
        mask[y : y + height, x : x + width][np.asarray(alpha) > 128] = number
        boxes_xyxy.append([x, y, x + width, y + height])
    return Scene(image, boxes_xyxy, mask)
