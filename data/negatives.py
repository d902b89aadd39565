"""Hard negatives by rules: texts that differ from a description in one word, which makes them wrong.

A word of a list is exchanged for another word of its list, as in NegCLIP (Yuksekgonul et al., ICLR 2023).
Rules see no image: they are right if a description says one thing about one object.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator

from grain_jax.core import annotations

VERSION = 1  # raise it if a description gets other negatives

# The words between two ; mean the same. The first replaces the words of the other groups.
_EXCLUSIVE = {
    "colour": "red scarlet crimson maroon; orange amber; yellow golden gold; green emerald olive; blue azure"
    " navy; purple violet lilac; pink rosy; white snowy ivory cream; black; brown chestnut tan beige; grey"
    " gray silver",
    "material": "wooden; metal metallic steel iron; plastic; leather; stone; concrete; ceramic; cardboard;"
    " rubber; woolen woollen; velvet",
    "pattern": "striped; spotted dotted; plain; checkered chequered plaid; floral flowery",
    "number": "two; three; four; five; six",
}
# Each word and its opposites, which may replace it.
_OPPOSITES = {
    "size": "big: small tiny; large: small tiny; huge: tiny small; small: large huge; little: large huge;"
    " tiny: huge large; long: short; short: long; tall: short; wide: narrow; broad: narrow; narrow: wide;"
    " thick: thin; thin: thick; open: closed; closed: open",
    "side": "left: right; right: left; upper: lower; lower: upper; top: bottom; bottom: top; front: rear;"
    " rear: front",
}
# Parts of one kind of thing; each also with an s behind it.
_PARTS = (
    "head tail wing leg ear beak eye paw neck chest",
    "wheel door window roof hood bumper headlight mirror",
    "sleeve collar pocket button zipper hood cuff",
    "handle lid spout rim",
    "leaf petal stem branch root",
)
_IRREGULAR = {"leaf": "leaves", "branch": "branches"}


def _lists() -> dict[str, dict[str, tuple[str, ...]]]:
    """Kind -> word -> the words that may replace it."""
    lists = {kind: {} for kind in (*_EXCLUSIVE, *_OPPOSITES, "part")}
    exclusive = [(kind, text.split(";")) for kind, text in _EXCLUSIVE.items()]
    for line in map(str.split, _PARTS):
        exclusive += [("part", line), ("part", [_IRREGULAR.get(x, f"{x}s") for x in line])]
    for kind, texts in exclusive:
        groups = [text.split() for text in texts]
        for group in groups:
            others = tuple(other[0] for other in groups if other is not group)
            for word in group:  # a hood is a part of cars and of clothes
                words = lists[kind].get(word, ()) + others
                lists[kind][word] = tuple(dict.fromkeys(words))
    for kind, text in _OPPOSITES.items():
        pairs = (pair.split(":") for pair in text.split(";"))
        lists[kind] = {word.strip(): tuple(others.split()) for word, others in pairs}
    return lists


_REPLACEMENTS = _lists()
KINDS = tuple(_REPLACEMENTS)
_WORD = re.compile(
    rf"\b({'|'.join(sorted({w for line_words in _REPLACEMENTS.values() for w in line_words}))})\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"\b(a)n?(?=\s+$)", re.IGNORECASE)  # right before the exchanged word


def make(description: str, number: int, *, others: Iterable[str] = ()) -> list[str]:
    """Up to `number` texts that differ from the description in one word, which makes them wrong.

    The kinds of words take turns. The result depends on the arguments; fewer negatives are the first of more.
    None equals one of `others`, the other descriptions of the image, in lower case.
    """
    rng = random.Random(f"negatives 0/{description}")
    by_kind = {kind: list(_of_kind(description, kind)) for kind in KINDS}
    order = [kind for kind, texts in by_kind.items() if texts]
    rng.shuffle(order)
    for kind in order:
        rng.shuffle(by_kind[kind])
    made = {annotations.plain(text): "" for text in (description, *others)}
    for turn in itertools.zip_longest(*(by_kind[kind][::-1] for kind in order), fillvalue=description):
        for text in turn:
            made.setdefault(annotations.plain(text), text)
    return list(filter(None, made.values()))[:number]


def _of_kind(description: str, kind: str) -> Iterator[str]:
    """The description with a word of that kind exchanged, for each such word and each replacement."""
    present = set(re.findall(r"\w+", description.lower()))
    for match in _WORD.finditer(description):
        old = match.group()
        for new in _REPLACEMENTS[kind].get(old.lower(), ()):
            if new in present:  # "white and white stripes"
                continue
            new = new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new
            n = "n" if new[0].lower() in "aeiou" else ""  # of "an"
            before = _ARTICLE.sub(rf"\g<1>{n}", description[: match.start()])
            yield before + new + description[match.end() :]
