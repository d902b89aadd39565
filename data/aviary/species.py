"""Species of the aviary: genera that share parts, and invented names.

A genus is one trait for each of the 8 parts; each of its species changes `parts_changed` of them. Held-out
species are of other genera, with traits that some training species has.
"""

import dataclasses
import functools
import itertools
import random
from typing import NamedTuple

from grain_jax.core import errors
from grain_jax.data.aviary.settings import Settings
from grain_jax.data.aviary.vocabulary import PARTS, TRAITS, Trait

_ONSETS = "b d f g j k l m n p r t v w z".split()
_MIDDLES = "mb nz lv rv zd lk mz gl vr rz lm lf mf vl zm bl".split()
_ENDINGS = "el ik or ub un oz im ul ep eg".split()
_WORDS = ("marvel", "denzel")  # real words that the syllables form
_TRIES = 2000


@dataclasses.dataclass(frozen=True)
class Species:
    """A species: an invented `name`, its `genus` (a number), one trait per part (in the order of PARTS)."""

    name: str
    genus: int
    traits: tuple[Trait, ...]

    def __getitem__(self, part: str) -> Trait:
        """The trait of `part`."""
        return self.traits[PARTS.index(part)]

    @property
    def descriptions(self) -> list[str]:
        """The plain phrases of all parts: the entry of the class in a descriptions file."""
        return [trait.phrase for trait in self.traits]


class AllSpecies(NamedTuple):
    """All species of a dataset."""

    training: tuple[Species, ...]
    held_out: tuple[Species, ...]


def distance(first: Species, second: Species) -> int:
    """The number of parts in which two species differ."""
    return sum(a != b for a, b in zip(first.traits, second.traits, strict=True))


@functools.lru_cache(maxsize=4)
def species_of(settings: Settings) -> AllSpecies:
    """Draws the species of a dataset. Any two differ in at least min(3, parts_changed) parts.

    Raises UserError: so many different species cannot be made.
    """
    rng = random.Random(f"aviary species {settings.seed}")
    count = settings.genera * settings.species_per_genus
    others = settings.held_out_genera * settings.held_out_species_per_genus
    names = invent_names(count + others, rng)
    made: list[Species] = []
    _add(made, names[:count], TRAITS, settings.genera, settings.parts_changed, rng)
    if others:
        seen = {trait for species in made for trait in species.traits}
        known = {part: [trait for trait in TRAITS[part] if trait in seen] for part in PARTS}
        _add(made, names[count:], known, settings.held_out_genera, settings.parts_changed, rng)
    return AllSpecies(training=tuple(made[:count]), held_out=tuple(made[count:]))


def _add(made, names, traits, genera, parts_changed, rng):
    """Appends one species per name to `made`, in `genera` new genera, with these traits by part."""
    per_genus = len(names) // genera
    first_genus = made[-1].genus + 1 if made else 0
    least = min(3, parts_changed)
    for number in range(genera):
        prototype = {part: rng.choice(traits[part]) for part in PARTS}
        for name in names[number * per_genus : (number + 1) * per_genus]:
            for _ in range(_TRIES):
                changed = rng.sample(PARTS, parts_changed)
                new = dict(prototype)
                for part in changed:
                    others = [trait for trait in traits[part] if trait != prototype[part]]
                    new[part] = rng.choice(others or [prototype[part]])
                species = Species(name, first_genus + number, tuple(new[part] for part in PARTS))
                if all(distance(species, other) >= least for other in made):
                    made.append(species)
                    break
            else:
                raise errors.UserError(
                    f"species: found none after {len(made)} that differs from each in {least} parts;"
                    " use more training species, fewer per genus, or more parts_changed"
                )


def invent_names(count: int, rng: random.Random) -> list[str]:
    """`count` words of two syllables that mean nothing and differ in two letters or more, e.g. "wumbel"."""
    possible = list(map("".join, itertools.product(_ONSETS, "aeiou", _MIDDLES, _ENDINGS)))
    rng.shuffle(possible)
    chosen, taken = [], set(_WORDS)
    for name in possible:
        # "?umbel", "w?mbel", ...: two names that share one differ in a single letter.
        masked = {name[:position] + "?" + name[position + 1 :] for position in range(len(name))} | {name}
        if not masked & taken:
            taken |= masked
            chosen.append(name)
    if count > len(chosen):
        raise errors.UserError(f"species: got {count}, expected at most {len(chosen)}")
    return chosen[:count]
