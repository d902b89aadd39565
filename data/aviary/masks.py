"""Label images of the test images, for `evaluate segmentation`: the part, or its look, that each pixel shows.

A set of label images is a folder with images/NAME.png (or .jpg above 128 pixels), masks/NAME.png (8 bits, the number of
the class, 0 for whatever is no part) and classes.txt (a name a line, the first is number 0). `parts` has the 8 names of
parts, `looks` the 101 phrases that describe them: a position tells the part, and the words alone tell the look.
"""

import io

import numpy as np
from etils import epath
from PIL import Image

from grain_jax.data.aviary.drawing import Drawing
from grain_jax.data.aviary.species import Species
from grain_jax.data.aviary.vocabulary import PARTS, TRAITS

FOLDER = "segmentation"  # below the data set
STAMP = "README.md"  # written last: where it stands, all label images are there
GROUPS = ("seen", "unseen")  # of species
_LOOKS = [trait for part in PARTS for trait in TRAITS[part]]
CLASSES = {
    "parts": ("background", *PARTS),
    "looks": ("background", *(trait.phrase for trait in _LOOKS)),
}
_README = """# Label images of the test images

`parts/` (8 parts) and `looks/` (the 101 phrases that describe them), each with a folder of seen and of unseen species:

| | |
|---|---|
| `images/` | the images of `test/images/` |
| `masks/` | PNGs of 8 bits: for each pixel the number of the class that covers most of it; 0 is whatever is no part |
| `classes.txt` | a name a line; the first has number 0 |
"""


def labels_of(kind: str, species: Species, drawn: Drawing) -> np.ndarray:
    """The class of each pixel, of `CLASSES[kind]`: uint8 [height, width]."""
    mask = drawn.part_mask()
    if kind == "parts":
        return mask
    looks = [0, *(1 + _LOOKS.index(species[part]) for part in PARTS)]
    return np.array(looks, np.uint8)[mask]


def begin(output: epath.Path) -> None:
    """Makes the folders and the names of the classes, below the data set `output`."""
    for kind, names in CLASSES.items():
        for group in GROUPS:
            folder = output / FOLDER / kind / group
            for part in ("images", "masks"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / "classes.txt").write_text("".join(name + "\n" for name in names))


def save(
    output: epath.Path, group: str, name: str, encoded: bytes, species: Species, drawn: Drawing
) -> None:
    """Writes a test image, whose file has this name and content, and its label images."""
    for kind in CLASSES:
        folder = output / FOLDER / kind / group
        (folder / "images" / name).write_bytes(encoded)
        labels = io.BytesIO()
        Image.fromarray(labels_of(kind, species, drawn)).save(labels, "PNG")
        (folder / "masks" / f"{name.rpartition('.')[0]}.png").write_bytes(labels.getvalue())


def are_there(output: epath.Path) -> bool:
    """Whether all label images were written."""
    return (output / FOLDER / STAMP).exists()


def finish(output: epath.Path) -> None:
    """Says that all label images are there."""
    (output / FOLDER / STAMP).write_text(_README)
