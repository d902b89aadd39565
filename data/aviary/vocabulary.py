"""The traits that a bird of the aviary can have, and the words for them.

A *trait* is one look of one part: ``Trait("beak", "hooked", "red")``.  The 8 parts have 101 traits
together; each trait has one plain phrase ("a hooked red beak") and some paraphrases.  No phrase
mentions left or right, so mirroring an image never contradicts its words.
"""

import dataclasses
import functools
import random

PARTS = ("crest", "beak", "eye", "throat", "breast", "wing", "tail", "legs")

# part -> shape or pattern -> its possible colours.
_LOOKS = {
    "crest": dict(
        spiky="red yellow blue white",
        tall="orange green red",
        round="pink yellow purple",
        curled="black blue orange",
    ),
    "beak": dict(
        long="orange black red yellow",
        short="yellow white blue",
        hooked="black red pink",
        curved="orange green purple",
    ),
    "eye": dict(
        ring="white red blue yellow",
        stripe="black white orange green",
        patch="red yellow purple pink",
    ),
    "throat": dict(
        patch="red blue white purple",
        collar="white black orange pink",
        bib="black yellow green red",
    ),
    "breast": dict(
        plain="red yellow blue white orange",
        spotted="white yellow pink green",
        striped="white orange purple blue",
    ),
    "wing": dict(
        plain="green black purple red",
        barred="blue brown red black",
        spotted="brown green blue",
        tipped="yellow orange white",
    ),
    "tail": dict(
        long="blue red white",
        forked="black green red orange",
        fanned="brown yellow purple",
        striped="yellow pink blue",
    ),
    "legs": dict(
        long="pink red yellow",
        short="orange black blue yellow",
        feathered="white brown green purple",
    ),
}

# The first phrase is the plain one; the others are its paraphrases.
_PHRASES = {
    ("crest", "spiky"): ("a spiky {} crest", "{} spikes on the head", "a {} crest of spikes"),
    ("crest", "tall"): ("a tall {} crest", "a high {} plume on the head", "a tall {} plume"),
    ("crest", "round"): ("a round {} crest", "a {} tuft, round and soft", "a round {} tuft"),
    ("crest", "curled"): ("a curled {} crest", "a {} curl on the head", "a curled {} plume"),
    ("beak", "long"): ("a long {} beak", "a {} bill, long and straight", "a long {} bill"),
    ("beak", "short"): ("a short {} beak", "a {} bill, short and thick", "a short {} bill"),
    ("beak", "hooked"): ("a hooked {} beak", "a {} bill with a hook", "a hooked {} bill"),
    ("beak", "curved"): ("a curved {} beak", "a {} bill that bends down", "a curved {} bill"),
    ("eye", "ring"): ("a {} eye ring", "a {} ring around the eye", "{} rings around the eyes"),
    ("eye", "stripe"): ("a {} eye stripe", "a {} stripe through the eye", "a {} line at the eye"),
    ("eye", "patch"): ("a {} eye patch", "a {} patch around the eye", "a {} cheek"),
    ("throat", "patch"): ("a {} throat", "a {} patch on the throat", "a throat that is {}"),
    ("throat", "collar"): ("a {} collar", "a {} band around the neck", "a {} neck band"),
    ("throat", "bib"): ("a pointed {} bib", "a {} bib below the beak", "a {} point on the throat"),
    ("breast", "plain"): ("a plain {} breast", "a {} chest", "a breast that is all {}"),
    ("breast", "spotted"): ("a spotted {} breast", "a {} chest with spots", "spots on a {} breast"),
    ("breast", "striped"): (
        "a striped {} breast",
        "a {} chest with stripes",
        "stripes on a {} breast",
    ),
    ("wing", "plain"): ("a plain {} wing", "{} wings", "a wing that is all {}"),
    ("wing", "barred"): ("a {} wing with bars", "bars on a {} wing", "{} wings with bars"),
    ("wing", "spotted"): ("a spotted {} wing", "a {} wing with spots", "{} wings with spots"),
    ("wing", "tipped"): (
        "a {} wing with a dark tip",
        "a dark tip on a {} wing",
        "{} wings with dark tips",
    ),
    ("tail", "long"): ("a long {} tail", "a {} tail, long and thin", "long {} tail feathers"),
    ("tail", "forked"): ("a forked {} tail", "a {} tail with two points", "a {} tail like a fork"),
    ("tail", "fanned"): ("a fanned {} tail", "a {} tail like a fan", "a wide {} tail"),
    ("tail", "striped"): ("a striped {} tail", "a {} tail with stripes", "stripes on a {} tail"),
    ("legs", "long"): ("long {} legs", "{} legs, long and thin", "tall {} legs"),
    ("legs", "short"): ("short {} legs", "{} legs, short and thick", "thick {} legs"),
    ("legs", "feathered"): ("feathered {} legs", "{} feathers on the legs", "soft {} legs"),
}

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
        others = range(1, len(_PHRASES[self.part, self.shape]))
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
        template = _PHRASES[self.trait.part, self.trait.shape][self.template]
        words = template.format(COLOUR_SYNONYMS[colour] if self.reworded else colour).split()
        return " ".join(  # "a orange beak" -> "an orange beak", wherever the article stands
            "an" if word == "a" and after[:1] in "aeiou" else word
            for word, after in zip(words, words[1:] + ["."], strict=True)
        )


@functools.cache
def _wordings() -> dict[str, _Wording]:
    """Description -> what it says, of each part, shape and colour, also of those that no bird has."""
    found = (
        _Wording(Trait(part, shape, colour), template, reworded)
        for (part, shape), templates in _PHRASES.items()
        for template in range(len(templates))
        for colour in COLOUR_SYNONYMS
        for reworded in (False, True)
    )
    return {wording.text: wording for wording in found}


def hard_negatives(description: str) -> list[tuple[str, Trait]]:
    """The description with another colour, or with another shape (or pattern) of the part, and what that says.

    Args:
      description: a phrase or paraphrase of a trait.
    """
    wording = _wordings()[description]
    trait = wording.trait
    others = [dataclasses.replace(trait, colour=colour) for colour in COLOUR_SYNONYMS]
    others += [dataclasses.replace(trait, shape=shape) for shape in _LOOKS[trait.part]]
    others = [other for other in others if other != trait]
    return [(dataclasses.replace(wording, trait=other).text, other) for other in others]


TRAITS = {
    part: tuple(
        Trait(part, shape, colour)
        for shape, colours in _LOOKS[part].items()
        for colour in colours.split()
    )
    for part in PARTS
}
