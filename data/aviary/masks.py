"""Label images of the test images, for `evaluate segmentation`: the part of the bird that each pixel shows.

Each group of species has a folder with images/, masks/ (8 bits) and classes.txt, a class per line, from
number 0 on. No text of the dataset names a part alone, so its line also has all phrases of its looks.
"""

import io
from collections.abc import Iterable

from etils import epath
from PIL import Image

from grain_jax.data.aviary.drawing import Drawing
from grain_jax.data.aviary.vocabulary import PARTS, TRAITS

FOLDER = "segmentation"  # below the dataset
CLASSES = ("background", *(", ".join([part, *(trait.phrase for trait in TRAITS[part])]) for part in PARTS))


def begin(output: epath.Path, groups: Iterable[str]) -> None:
    """Makes the folders, the lists of classes and the prompt, below the dataset `output`."""
    for group in groups:
        folder = output / FOLDER / group
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "classes.txt").write_text("".join(name + "\n" for name in CLASSES))
    (output / FOLDER / "templates.txt").write_text("{}\n")  # the prompt for all classes: the phrase alone


def save(output: epath.Path, group: str, name: str, encoded: bytes, drawn: Drawing) -> None:
    """Writes a test image, whose file has this name and content, and its label image."""
    folder = output / FOLDER / group
    (folder / "images" / name).write_bytes(encoded)
    labels = io.BytesIO()
    Image.fromarray(drawn.part_mask()).save(labels, "PNG")
    (folder / "masks" / f"{name.rpartition('.')[0]}.png").write_bytes(labels.getvalue())
