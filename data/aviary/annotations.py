"""The words and boxes of an image: exact, or with the noise of web text, an MLLM and a detector.

Every kind of noise draws from its own random stream, and draws the same numbers at every rate. So a higher
rate keeps the errors of a lower one, adds more, and changes no other kind of noise.
"""

import collections
import dataclasses
import math
import random

from etils import epath

from grain_jax.core.annotations import iou
from grain_jax.data.aviary.drawing import Drawing
from grain_jax.data.aviary.settings import Noise
from grain_jax.data.aviary.species import Species
from grain_jax.data.aviary.vocabulary import PARTS, TRAITS, hard_negatives

# Captions by kind; names in braces are filled in later.
_CAPTIONS: dict[str, list[str]] = collections.defaultdict(list)
for _line in epath.Path(__file__).with_name("captions.tsv").read_text().splitlines()[1:]:
    _kind, _caption = _line.split("\t")
    _CAPTIONS[_kind].append(_caption)
_ALL_TRAITS = tuple(trait for part in PARTS for trait in TRAITS[part])
_LEAST_AREA = 0.001  # share of the image; a smaller part counts as hidden
EXACT = Noise(**dict.fromkeys((field.name for field in dataclasses.fields(Noise)), 0.0))


def visible_parts(drawing: Drawing) -> list[str]:
    """The parts that show at least a thousandth of the image."""
    return [part for part in PARTS if drawing.areas.get(part, 0) >= _LEAST_AREA]


def web_caption(
    species: Species, others: tuple[Species, ...], drawing: Drawing, key: str, noise: Noise
) -> str:
    """Alt text as on the web, with the name of the species, a name from `others`, or no name."""
    rng = random.Random(key + "/web")
    named, nameless = rng.choice(_CAPTIONS["web"]), rng.choice(_CAPTIONS["nameless"])
    wrong = rng.choice(others).name if others else species.name
    values = {
        "place": drawing.scene.place,
        "perch": drawing.scene.perch_phrase,
        "number": rng.randrange(1000, 10000),
        "day": rng.randrange(1, 30),
    }
    fate = rng.random()
    if fate < noise.missing_names:
        return nameless.format(**values)
    name = wrong if fate > 1 - noise.wrong_names else species.name
    return named.format(name=name, **values)


def synthetic_caption(species: Species, drawing: Drawing, key: str, noise: Noise, *, parts: int = 2) -> str:
    """A caption as an MLLM writes it: some parts, the perch or the background, never a name."""
    rng = random.Random(key + "/synthetic")
    template = rng.choice(_CAPTIONS["synthetic"])
    seen = visible_parts(drawing)
    rng.shuffle(seen)
    phrases = [
        _describe(species, part, rng, noise.caption_errors, noise.synthetic_paraphrased)[0]
        for part in seen[:parts]
    ]
    scene = drawing.scene
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))
    caption = template.format(parts=listed, perch=scene.perch_phrase, background=scene.background)
    things = scene.thing_phrases
    if things and rng.random() < 0.4:
        caption += f", next to {things[0]}"
    return caption


def regions(
    species: Species, drawing: Drawing, key: str, noise: Noise, *, least: int = 3, most: int = 5
) -> list[dict]:
    """Regions of `least` to `most` visible parts, without the missed ones: box, description and score.

    `box` is [x1, y1, x2, y2] in pixels, inside the image. As with a detector, the score falls with the error
    of the box and with a wrong description; it stays in [0.3, 0.99].
    """
    rng = random.Random(key + "/parts")
    chosen = visible_parts(drawing)
    rng.shuffle(chosen)
    chosen = chosen[: rng.randint(least, most)]
    made = []
    for part in chosen:
        miss, box_rng, word_rng, error = (
            random.Random(f"{key}/{part}/{kind}") for kind in ("miss", "box", "words", "score")
        )
        if miss.random() < noise.misses:
            continue
        true_box = drawing.boxes_xyxy[part]
        box = _jittered(true_box, drawing.image.size, box_rng, noise.jitter)
        description, wrong = _describe(species, part, word_rng, noise.wrong_descriptions, noise.paraphrased)
        score = 0.88 - 0.6 * (1 - iou(box, true_box)) - 0.22 * wrong
        score = round(min(0.99, max(0.3, score + noise.score_noise * error.gauss(0, 1))), 3)
        made.append({"box": box, "description": description, "score": score})
    return made


def negatives(species: Species, description: str, key: str, number: int) -> list[str]:
    """Up to 10 texts that differ from a description in colour or shape, and are not true of the bird."""
    wrong = [text for text, trait in hard_negatives(description) if trait not in species.traits]
    random.Random(f"{key}/negatives/{description}").shuffle(wrong)
    return wrong[:number]


def _describe(species, part, rng, wrong_rate, paraphrase_rate):
    """(description, whether it is wrong); draws the same random numbers at every rate."""
    wrong, other = rng.random() < wrong_rate, rng.choice(_ALL_TRAITS)
    while other in species.traits:
        other = rng.choice(_ALL_TRAITS)
    reworded, trait = rng.random() < paraphrase_rate, other if wrong else species[part]
    return (trait.paraphrase(rng) if reworded else trait.phrase), wrong


def _jittered(box, size, rng, jitter):
    """`box` with each edge moved, sorted, at least a pixel wide, inside the image."""
    edges = []
    for axis in (0, 1):
        low, high = box[axis], box[axis + 2]
        low, high = sorted(edge + rng.gauss(0, 1) * jitter * (high - low) for edge in (low, high))
        low = min(max(0.0, low), size[axis] - 1.0)
        edges.append((low, min(max(high, low + 1.0), float(size[axis]))))
    (x1, x2), (y1, y2) = edges
    return [math.floor(value * 100 + 0.5) / 100 for value in (x1, y1, x2, y2)]
