"""The traits that a bird of the aviary can have, and the words for them.

A *trait* is one look of one part: ``Trait("beak", "hooked", "red")``.  The 8 parts have 101 traits
together (vocabulary.tsv); each has one plain phrase ("a hooked red beak") and some paraphrases.  No
phrase mentions left or right, so mirroring an image never contradicts its words.
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
        return _Wording(self, 0, reworded=False).text

    def paraphrase(self, rng: random.Random) -> str:
        """Another wording, drawn with `rng`; three in ten use another word for the colour."""
        others = range(1, len(_LOOKS[self.part, self.shape]) - 1)
        return _Wording(self, rng.choice(others), reworded=rng.random() < 0.3).text


@dataclasses.dataclass(frozen=True)
class _Wording:
    """How a description says a trait."""

    trait: Trait
    template: int  # which of the phrases of the part and shape
    reworded: bool  # by another word for the colour

    @property
    def text(self) -> str:
        colour = self.trait.colour
        template = _LOOKS[self.trait.part, self.trait.shape][1 + self.template]
        known_words = template.format(COLOUR_SYNONYMS[colour] if self.reworded else colour).split()
        return " ".join(  # "a orange beak" -> "an orange beak", wherever the article stands
            "an" if word == "a" and after[:1] in "aeiou" else word
            for word, after in zip(known_words, known_words[1:] + ["."], strict=True)
        )


@functools.cache
def _wordings() -> dict[str, _Wording]:
    """Description -> its trait, for every part, shape and colour, also if no bird has that look."""
    others = (
        _Wording(Trait(part, shape, colour), template, reworded)
        for (part, shape), (_, *templates) in _LOOKS.items()
        for template in range(len(templates))
        for colour in COLOUR_SYNONYMS
        for reworded in (False, True)
    )
    return {wording.text: wording for wording in others}


def hard_negatives(description: str) -> list[tuple[str, Trait]]:
    """The description with another colour, or another shape (or pattern) of the part; each with its trait.

    Args:
      description: a phrase or paraphrase of a trait.
    """
    wording = _wordings()[description]
    trait = wording.trait
    others = [dataclasses.replace(trait, colour=colour) for colour in COLOUR_SYNONYMS]
    others += [Trait(part, shape, trait.colour) for part, shape in _LOOKS if part == trait.part]
    others = [other for other in others if other != trait]
    return [(dataclasses.replace(wording, trait=other).text, other) for other in others]


_ALL = [Trait(*look, colour) for look, row in _LOOKS.items() for colour in row[0].split()]
TRAITS = {part: tuple(trait for trait in _ALL if trait.part == part) for part in PARTS}
