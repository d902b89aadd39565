"""Label images of the test images, for `evaluate segmentation`: the part, or its look, that each pixel shows.

Each group of species has a folder. images/ has NAME.png (or .jpg above 128 pixels). masks/ has label images
of 8 parts, named in classes.txt, looks/ of the 101 phrases for them, listed in looks.txt. A pixel is the
number of the class that covers most of it, 0 if it shows no part. A list has a class per line, from number 0
on. No text says the name of a part alone, so its line also has all phrases of its looks, with commas between.
"""

import io
from collections.abc import Iterable

import numpy as np
from etils import epath
from PIL import Image

from grain_jax.data.aviary.drawing import Drawing
from grain_jax.data.aviary.species import Species
from grain_jax.data.aviary.vocabulary import PARTS, TRAITS

FOLDER = "segmentation"  # below the dataset
GROUPS = ("seen", "unseen")  # of species
_LOOKS = [trait for part in PARTS for trait in TRAITS[part]]
# Folder of label images -> its classes, with commas between the names of a class.
CLASSES = {
    "masks": (
        "background",
        *(", ".join([part, *(trait.phrase for trait in TRAITS[part])]) for part in PARTS),
    ),
    "looks": ("background", *(trait.phrase for trait in _LOOKS)),
}
FILES = {"masks": "classes.txt", "looks": "looks.txt"}
TEMPLATES = "templates.txt"  # the prompt for all classes: the phrase alone


def labels_of(kind: str, species: Species, drawn: Drawing) -> np.ndarray:
    """The class of each pixel, of `CLASSES[kind]`: uint8 [height, width]."""
    mask = drawn.part_mask()
    if kind == "masks":
        return mask
    looks = [0, *(1 + _LOOKS.index(species[part]) for part in PARTS)]
    return np.array(looks, np.uint8)[mask]


def begin(output: epath.Path, groups: Iterable[str] = GROUPS) -> None:
    """Makes the folders, the lists of classes and the prompt, below the dataset `output`."""
    for group in groups:
        folder = output / FOLDER / group
        for part in ("images", *CLASSES):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for kind, names in CLASSES.items():
            (folder / FILES[kind]).write_text("".join(name + "\n" for name in names))
    (output / FOLDER / TEMPLATES).write_text("{}\n")


def save(output: epath.Path, group: str, name: str, encoded: bytes, species: Species, drawn: Drawing) -> None:
    """Writes a test image, whose file has this name and content, and its label images."""
    folder = output / FOLDER / group
    (folder / "images" / name).write_bytes(encoded)
    for kind in CLASSES:
        labels = io.BytesIO()
        Image.fromarray(labels_of(kind, species, drawn)).save(labels, "PNG")
        (folder / kind / f"{name.rpartition('.')[0]}.png").write_bytes(labels.getvalue())
