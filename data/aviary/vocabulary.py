"""The traits that a bird of the aviary can have, and the words for them.

A *trait* is one look of one part: ``Trait("beak", "hooked", "red")``. Each has one plain phrase ("a hooked
red beak") and some paraphrases. None mentions left or right, so a mirrored image has the same words.
"""

import dataclasses
import functools
import random

from etils import epath

PARTS = ("crest", "beak", "eye", "throat", "breast", "wing", "tail", "legs")
_TABLE = epath.Path(__file__).with_name("vocabulary.tsv").read_text().splitlines()[1:]
# (part, shape or pattern) -> its possible colours, the plain phrase and its paraphrases.
_LOOKS = {(part, shape): texts for part, shape, *texts in (line.split("\t") for line in _TABLE)}

# Other words that a paraphrase may use for a colour.
COLOUR_SYNONYMS = {
    "red": "scarlet",
    "orange": "amber",
    "yellow": "golden",
    "green": "emerald",
    "blue": "azure",
    "purple": "violet",
    "pink": "rosy",
    "white": "snowy",
    "black": "jet black",
    "brown": "chestnut",
}


@dataclasses.dataclass(frozen=True)
class Trait:
    """One look of one part: `part` (of PARTS), `shape` (or pattern) and `colour`."""

    part: str
    shape: str
    colour: str

    @property
    def phrase(self) -> str:
        """The plain description, e.g. "an orange eye stripe"."""
        return self.worded(0, self.colour)

    def paraphrase(self, rng: random.Random) -> str:
        """Another wording, drawn with `rng`; three in ten use another word for the colour."""
        template = rng.choice(range(1, len(_LOOKS[self.part, self.shape]) - 1))
        reworded = rng.random() < 0.3
        return self.worded(template, COLOUR_SYNONYMS[self.colour] if reworded else self.colour)

    def worded(self, template: int, colour: str) -> str:
        """The phrase with this number of the part and shape, with this word for the colour."""
        words = _LOOKS[self.part, self.shape][1 + template].format(colour).split()
        return " ".join(  # "a orange beak" -> "an orange beak", wherever the article stands
            "an" if word == "a" and after[:1] in "aeiou" else word
            for word, after in zip(words, words[1:] + ["."], strict=True)
        )


@functools.cache
def _wordings() -> dict[str, tuple[Trait, int, bool]]:
    """Description -> trait, phrase, other word for the colour; also for looks that no bird has."""
    return {
        Trait(*look, colour).worded(template, word): (Trait(*look, colour), template, word != colour)
        for look, (_, *templates) in _LOOKS.items()
        for template in range(len(templates))
        for colour, synonym in COLOUR_SYNONYMS.items()
        for word in (colour, synonym)
    }


def hard_negatives(description: str) -> list[tuple[str, Trait]]:
    """The phrase or paraphrase with another colour or shape (or pattern) of the part; each with its trait."""
    trait, template, reworded = _wordings()[description]
    others = [dataclasses.replace(trait, colour=colour) for colour in COLOUR_SYNONYMS]
    others += [Trait(part, shape, trait.colour) for part, shape in _LOOKS if part == trait.part]
    words = COLOUR_SYNONYMS if reworded else {colour: colour for colour in COLOUR_SYNONYMS}
    return [(other.worded(template, words[other.colour]), other) for other in others if other != trait]


_ALL = [Trait(*look, colour) for look, row in _LOOKS.items() for colour in row[0].split()]
TRAITS = {part: tuple(trait for trait in _ALL if trait.part == part) for part in PARTS}
