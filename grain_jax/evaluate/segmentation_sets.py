"""Images with label masks: a folder of images and masks, ADE20K and Pascal VOC.

A mask is a PNG of one channel, grey or with a palette, of 1 to 16 bits, as large as its image. Its numbers
are ids: a `Layout` says which of them are classes, and which do not count.
"""

from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax.core import errors, regular_file
from grain_jax.core import images as image_files
from grain_jax.evaluate import class_names, test_sets
from grain_jax.evaluate.base import how_to_get
from grain_jax.inference import segmentation
from grain_jax.inference.inputs import InputError

# What an id that is no class becomes: it does not count, or it is a fault.
IGNORED, OUTSIDE = -1, -2
BACKGROUND = "background"  # the name of the class that a threshold gives
_IDS = 1 << 16
_IMAGES = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff".split())


class Layout(NamedTuple):
    """Where a dataset keeps its images and masks below its root, and what its ids mean."""

    images: str
    masks: str  # NAME.png for each image
    ignored: int  # the id that does not count, unless it is a class
    classes: str = ""  # a file of grain_jax/evaluate/classes; "": classes.txt in the root
    first: int = 0  # the id of the first class
    listed: str = ""  # file of the names of the images; "": all images of the folder
    orientation: str = "file"  # of `core.images`; masks of public datasets are of the stored pixels


LAYOUTS = {
    "folder": Layout("images", "masks", 255, orientation="exif"),
    "ade20k": Layout("images/validation", "annotations/validation", 0, "ade20k", first=1),
    "voc": Layout(
        "JPEGImages", "SegmentationClass", 255, "pascal_voc", listed="ImageSets/Segmentation/val.txt"
    ),
}


class Segmented(NamedTuple):
    """Images with masks, and the classes."""

    images: list[test_sets.Image]  # to be read in the orientation of their masks
    masks: list[epath.Path]
    names: list[str]  # for each class, in order; commas divide alternatives
    labels: list[str]  # the first name of each class
    class_of: np.ndarray  # int32 [_IDS], id -> position of the class, IGNORED or OUTSIDE

    @property
    def background(self) -> int | None:
        """The position of the class `background`."""
        return self.labels.index(BACKGROUND) if BACKGROUND in self.labels else None


def open_set(images: str, layout: str, ignore: int | None = None, get: str | None = None) -> Segmented:
    """Finds the images, masks and classes of a dataset; no image is read.

    Args:
      images: the root of the dataset.
      layout: a name in LAYOUTS.
      ignore: a further id that does not count, even if it is a class.
      get: how to get the data, for errors.MissingData.

    Raises:
      errors.MissingData: a folder or the list of images is not there.
      InputError: no mask, or two classes of one name.
      class_names.ClassNameError: the class file cannot be used.
    """
    root, spec = epath.Path(images), LAYOUTS[layout]
    of_images, of_masks, listed = root / spec.images, root / spec.masks, root / spec.listed
    for path in (of_images, of_masks, listed):
        if not path.exists():
            raise errors.MissingData(
                f"{path}: no such file or folder, expected one of the format {layout}{how_to_get(get)}"
            )
    classes = spec.classes or str(root / "classes.txt")
    names, labels = class_labels(classes)
    class_of = np.full(_IDS, OUTSIDE, np.int32)
    class_of[spec.ignored] = IGNORED
    class_of[spec.first : spec.first + len(names)] = np.arange(len(names))
    if ignore is not None:
        class_of[ignore] = IGNORED
    if spec.listed:
        stems = regular_file.read_text(listed, "names of images, one per line").split()
        paths = [of_images / f"{stem}.jpg" for stem in stems]
    else:
        paths = _below(of_images)
    masks = [(of_masks / path.relative_to(of_images)).with_suffix(".png") for path in paths]
    if not any(mask.exists() for mask in masks):  # usually the first exists
        raise InputError(f"{of_images}: none of its {len(masks)} images has a mask in {of_masks}")
    opened = [test_sets.of_path(path, orientation=spec.orientation) for path in paths]
    return Segmented(opened, masks, names, labels, class_of)


def _below(folder: epath.Path) -> list[epath.Path]:
    """The images in a folder and its sub-folders, by name; hidden ones do not count."""
    images = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in _IMAGES:
            images.append(path)
        elif path.is_dir():
            images += _below(path)
    return sorted(images, key=str)


def class_labels(classes: str) -> tuple[list[str], list[str]]:
    """The names of the classes of a file for prompts, and one name of each."""
    names = [line.name for line in class_names.read(classes)]
    labels = [(segmentation.alternatives(name) or [name])[0] for name in names]
    labels = [n if labels.count(label) > 1 else label for n, label in zip(names, labels)]
    if twice := class_names.twice(labels):
        raise InputError(f"classes {classes}: got {twice!r} twice, expected it once")
    return names, labels


def read_mask(path: epath.Path, class_of: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel, int32 [H, W]: its position, or IGNORED.

    Args:
      path: the mask.
      class_of: as in Segmented.
      size: width and height of the image.

    Raises:
      ImageError: the mask is missing, not a PNG of one channel, of another size than the image, or has an id
        that is no class.
    """
    try:
        encoded = image_files.read_file(path)
    except OSError as error:
        raise image_files.ImageError(f"{path}: {error.strerror or error}") from None
    ids = decode_mask(encoded, str(path), size)
    classes = class_of[ids]
    if (outside := np.unique(ids[classes == OUTSIDE])).size:
        raise image_files.ImageError(
            f"{path}: got the ids {test_sets.listed(list(map(str, outside)), 5)}, expected those of the"
            f" {class_of.max() + 1} classes or ignored ones"
        )
    return classes


def decode_mask(encoded: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """The ids in a mask, uint8 or uint16 [H, W]; raises as `read_mask`."""
    image = image_files.open_image(encoded, name)
    if image.size != size:
        raise image_files.ImageError(f"{name}: got {image.size} pixels, expected {size}, as the image has")
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise image_files.ImageError(
            f"{name}: got {image.format}, mode {image.mode}, expected a PNG of one channel, grey or palette"
        )
    depth, colour = encoded[24], encoded[25]
    ids = np.asarray(image_files.decode_image(encoded, name, "file"))
    if colour == 0 and depth in (2, 4):  # Pillow spreads them over 0 to 255
        ids = ids // (255 // (2**depth - 1))
    return ids.astype(np.uint16 if depth == 16 else np.uint8)
