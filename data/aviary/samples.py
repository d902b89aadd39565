"""A few drawn birds in memory, to try a model on: nothing is written."""

import random
from typing import NamedTuple

from PIL import Image

from grain_jax.data.aviary import generate
from grain_jax.data.aviary.settings import Settings
from grain_jax.data.aviary.species import species_of


class Bird(NamedTuple):
    """A drawn bird."""

    image: Image.Image  # RGB
    name: str  # of the species
    descriptions: list[str]  # of the species: a phrase for each of its 8 parts
    # Description -> box in [0, 1], of parts in sight.
    boxes_xyxy: dict[str, tuple[float, float, float, float]]


def birds(count: int = 4, *, seen: bool = False, seed: int = 0, size: int = 64) -> list[Bird]:
    """Draws birds of `count` species of the aviary with the default settings, the species of `aviary-tiny`.

    The images are in none of the sets that `grain_jax.data.aviary` writes. They are `size` pixels wide.
    `seen` birds are of species that training shows and names, others of those that it never does. `seed`
    decides which species and which images. Species take turns.
    """
    settings = Settings(size=size)
    aviary = species_of(settings)
    species = list(aviary.training if seen else aviary.held_out)
    random.Random(f"aviary sample {seed}").shuffle(species)
    made = []
    for i in range(count):
        species_drawn = species[i % len(species)]
        drawn = generate.drawing_of(settings, f"sample {seed}", i, species_drawn)
        boxes = {
            trait.phrase: tuple(edge / size for edge in drawn.boxes_xyxy[trait.part])
            for trait in species_drawn.traits
            if trait.part in drawn.boxes_xyxy
        }
        made.append(Bird(drawn.image, species_drawn.name, species_drawn.descriptions, boxes))
    return made
