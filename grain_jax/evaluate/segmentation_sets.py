"""Images with label masks: the public datasets in their own folders, and folders of images and masks.

A mask is a PNG of one channel, grey or with a palette, of 1 to 16 bits, as large as its image. Its numbers are ids: a
`Layout` says which of them are classes, and which do not count.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
_IGNORED_ID = 255  # for a folder, if it is no class
_FILE_NAME = r"\w[\w.-]*"
BACKGROUND = "background"  # the name of the class that a threshold gives
MAX_PIXELS = 1 << 25  # of an image with a mask: several are in memory at one time
_IDS = 1 << 16
_IMAGES = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff".split())
_NAMED = 5  # ids that a message lists


class Layout(NamedTuple):
    """Where a dataset keeps its images and masks, and what its ids mean. SPLIT stands for the split."""

    images: str  # folder below the root
    masks: str
    # Names of a mask, of which the first one that exists counts; NAME is the image's without `image_end`.
    mask_names: tuple[str, ...] = ("NAME.png",)
    # For each name of a mask id -> position of the class.
    ids: tuple[Mapping[int, int], ...] = ()
    ignored: tuple[int, ...] = ()
    classes: str = ""  # a file of grain_jax/evaluate/classes
    split: str = "val"
    listed: str = ""  # file of the names of the split; "": all images of the folder
    image_end: str = ""  # after NAME in the names of images, without the suffix
    background: bool = False  # whether `background` precedes the classes of the file


def _in_order(first: int, count: int) -> dict[int, int]:
    return {first + i: i for i in range(count)}


def _numbered(ids: Sequence[int]) -> dict[int, int]:
    return {identity: i for i, identity in enumerate(ids)}


_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
# Ids of COCO's things that no image of COCO-Stuff has; in the files an id is one less.
_UNUSED_COCO = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_COCO_IDS = [i - 1 for i in range(1, 183) if i not in _UNUSED_COCO]
_CONTEXT: dict[str, Any] = dict(
    images="JPEGImages",
    masks="SegmentationClassContext",
    listed="ImageSets/SegmentationContext/SPLIT.txt",
    classes="pascal_context",
)
LAYOUTS = {
    "folder": Layout(images="images", masks="masks"),  # the class file gives the ids
    "ade20k": Layout(
        images="images/SPLIT",
        masks="annotations/SPLIT",
        ids=(_in_order(1, 150),),
        ignored=(0,),
        classes="ade20k",
        split="validation",
    ),
    "voc": Layout(
        images="JPEGImages",
        masks="SegmentationClass",
        listed="ImageSets/Segmentation/SPLIT.txt",
        ids=(_in_order(0, 21),),
        ignored=(255,),
        classes="pascal_voc",
    ),
    "context59": Layout(**_CONTEXT, ids=(_in_order(1, 59),), ignored=(0, 255)),
    "context60": Layout(**_CONTEXT, ids=(_in_order(0, 60),), ignored=(255,), background=True),
    "cityscapes": Layout(
        images="leftImg8bit/SPLIT",
        masks="gtFine/SPLIT",
        mask_names=("NAME_gtFine_labelTrainIds.png", "NAME_gtFine_labelIds.png"),
        ids=(_in_order(0, 19), _numbered(_CITYSCAPES_IDS)),
        ignored=(*range(34), 255),
        classes="cityscapes",
        image_end="_leftImg8bit",
    ),
    "coco_stuff": Layout(
        images="images/SPLIT",
        masks="annotations/SPLIT",
        mask_names=("NAME_labelTrainIds.png", "NAME.png"),
        ids=(_in_order(0, 171), _numbered(_COCO_IDS)),
        ignored=(255,),
        classes="coco_stuff",
        split="val2017",
    ),
}
FOLDER = "folder"  # images/ and masks/ of the same names, classes.txt


class Masked(NamedTuple):
    """An image with its mask."""

    image: epath.Path
    mask: epath.Path
    class_of: np.ndarray  # int16 [_IDS], id -> position of the class, IGNORED or OUTSIDE


class Segmented(NamedTuple):
    """Images with masks, and the classes."""

    pairs: list[Masked]
    names: list[str]  # for each class, in order; commas divide alternatives
    labels: list[str]  # the first name of each class
    background: int | None  # the position of the class `background`

    def images(self, orientation: str) -> list[test_sets.Image]:
        """The images, to be read as `core.images` says."""
        return [test_sets.of_path(pair.image, orientation=orientation) for pair in self.pairs]


def open_set(
    images: str,
    masks: str | None,
    *,
    layout: str,
    split: str | None = None,
    classes: str | None = None,
    ignore: int | None = None,
    get: str | None = None,
) -> Segmented:
    """Finds the images, masks and classes of a dataset; no image is read.

    Args:
      images: the root of the dataset; with `masks` the folder of the images.
      masks: the folder of the masks, for a layout without a list of its split.
      layout: a name in LAYOUTS.
      split: None: the default of the layout.
      classes: class file (class_names.read); None: the layout's, for a folder classes.txt.
      ignore: the id that does not count in a folder; None: 255, if it is no class.
      get: how to get the data, for errors.MissingData.

    Raises:
      errors.MissingData: a folder or the list of the split is not there.
      InputError: no image, a split or a name in the list that leads elsewhere, a folder that cannot be read, or class
        names that do not fit.
      class_names.ClassNameError: the class file cannot be used.
    """
    root, spec = epath.Path(images), LAYOUTS[layout]
    split = split or spec.split
    if not re.fullmatch(_FILE_NAME, split):
        raise InputError(f"split: got {split[:60]!r}, expected one such as {spec.split}")
    fill = lambda text: text.replace("SPLIT", split)
    of_images = root if masks else root / fill(spec.images)
    of_masks = epath.Path(masks).expanduser() if masks else root / fill(spec.masks)
    for folder in (of_images, of_masks):
        if not folder.is_dir():
            raise errors.MissingData(
                f"{folder}: no such folder, expected images or masks of the format {layout}{how_to_get(get)}"
            )
    file = classes or spec.classes or classes_beside(root, masks)
    names, labels = _classes(file, spec.background)
    if spec.ids:
        tables = [_table(ids, spec.ignored) for ids in spec.ids]
        if len(names) != (expected := len({*spec.ids[0].values()})):
            raise InputError(
                f"classes {file}: got {len(names)} classes, expected the {expected} of {layout}"
            )
    else:
        tables = [_table(_in_order(0, len(names)), ())]
        if ignore is not None or len(names) <= _IGNORED_ID:
            # The user's id does not count, even if it is the id of a class.
            tables[0][_IGNORED_ID if ignore is None else ignore] = IGNORED
    if spec.listed:
        paths = _listed(root / fill(spec.listed), of_images, get)
    else:
        paths = _below(of_images, spec.image_end)

    @functools.cache
    def names_in(folder: epath.Path) -> set[str]:  # one question, not one for each image
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def pair(path: epath.Path) -> Masked:
        name = path.name.removesuffix(path.suffix).removesuffix(spec.image_end)
        folder = of_masks / path.parent.relative_to(of_images)
        masks = [mask.replace("NAME", name) for mask in spec.mask_names]
        last = len(masks) - 1
        number = next((i for i in range(last) if masks[i] in names_in(folder)), last)
        return Masked(path, folder / masks[number], tables[number])

    pairs = list(map(pair, paths))
    if not pairs:
        raise InputError(f"{of_images}: got no image, expected images with masks")
    if not any(each.mask.exists() for each in pairs):  # usually the first exists
        raise InputError(
            f"{of_images}: none of its {len(pairs)} images has a mask; the first: {pairs[0].mask}"
        )
    background = labels.index(BACKGROUND) if BACKGROUND in labels else None
    return Segmented(pairs, names, labels, background)


def classes_beside(images: epath.PathLike, masks: str | None) -> str:
    """The class file of a folder; arguments as for `open_set`."""
    root = epath.Path(images)
    return str((root.parent if masks else root) / "classes.txt")


def _below(folder: epath.Path, end: str) -> list[epath.Path]:
    """The images in a folder and its sub-folders, by name; hidden ones do not count. A folder counts once."""
    images, folders, seen = [], [folder], set[str]()
    while folders:
        folder = folders.pop()
        real = str(folder) if "://" in str(folder) else os.path.realpath(folder)
        if real in seen:  # a link has led here
            continue
        seen.add(real)
        try:
            paths = sorted(folder.iterdir(), key=str, reverse=True)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{folder}: {reason}, expected a folder that can be read") from None
        for path in paths:
            if path.name.startswith("."):
                continue
            if path.suffix.lower() in _IMAGES:
                if path.name.removesuffix(path.suffix).endswith(end):
                    images.append(path)
            elif path.is_dir():
                folders.append(path)
    return sorted(images, key=str)


def _listed(path: epath.Path, folder: epath.Path, get: str | None) -> list[epath.Path]:
    """The images that a file of names lists, one per line."""
    if not path.exists():
        raise errors.MissingData(f"{path}: not there, expected names of images{how_to_get(get)}")
    lines = regular_file.read_text(path, "names of images, one per line").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    for number, name in enumerate(names, 1):
        if not re.fullmatch(_FILE_NAME, name):
            raise InputError(
                f"{path}: name {number}: got {name[:60]!r}, expected one such as 2007_000033"
            )
    return [folder / f"{name}.jpg" for name in names]


def _classes(classes: str, background: bool) -> tuple[list[str], list[str]]:
    """The names of classes for prompts, and one name of each."""
    names = [BACKGROUND] * background + [line.name for line in class_names.read(classes)]
    labels = [segmentation.alternatives(name)[0] if name.strip(", ") else "" for name in names]
    if "" in labels:
        raise InputError(f"classes {classes}: got {names[labels.index('')]!r}, expected a name")
    labels = [n if labels.count(label) > 1 else label for n, label in zip(names, labels)]
    if twice := class_names.twice(labels):
        raise InputError(f"classes {classes}: got {twice!r} twice, expected it once")
    return names, labels


def _table(ids: Mapping[int, int], ignored: Sequence[int]) -> np.ndarray:
    table = np.full(_IDS, OUTSIDE, np.int16)
    table[list(ignored)] = IGNORED
    table[list(ids)] = list(ids.values())
    return table


def read_mask(pair: Masked, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel, int16 [H, W]: its position, or IGNORED.

    Args:
      pair: an image with its mask.
      size: width and height of the image.

    Raises:
      ImageError: the image is too large; the mask is missing, not a PNG of one channel, of another size than the image,
        or has an id that is no class.
    """
    name = str(pair.mask)
    if size[0] * size[1] > MAX_PIXELS:
        raise image_files.TooLargeError(
            f"{pair.image}: got {size[0]} x {size[1]} pixels, expected at most {MAX_PIXELS:,} in all"
        )
    try:
        encoded = image_files.read_file(pair.mask)
    except OSError as error:
        reason = error.strerror or error
        raise image_files.ImageError(
            f"{name}: {reason}, expected the mask of {pair.image}"
        ) from None
    ids = decode_mask(encoded, name, size)
    classes = pair.class_of[ids]
    outside = np.unique(ids[classes == OUTSIDE])
    if len(outside):
        more = ", ..." if len(outside) > _NAMED else ""
        raise image_files.ImageError(
            f"{name}: got the ids {', '.join(map(str, outside[:_NAMED]))}{more} at"
            f" {(classes == OUTSIDE).sum():,} pixels, expected those of the {pair.class_of.max() + 1} classes or"
            " ignored ones"
        )
    return classes


def decode_mask(encoded: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """The ids in a mask, uint8 or uint16 [H, W]; raises as `read_mask`."""
    image = image_files.open_image(encoded, name)
    if image.size != size:
        width, height = image.size
        raise image_files.ImageError(
            f"{name}: got {width} x {height} pixels, expected {size[0]} x {size[1]}, those of the image"
        )
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise image_files.ImageError(
            f"{name}: got {image.format}, mode {image.mode}, expected a PNG of one channel, grey or with a palette"
        )
    if encoded[12:16] != b"IHDR":
        raise image_files.ImageError(f"{name}: got a PNG without its header, expected one")
    depth, colour = encoded[24], encoded[25]
    ids = np.asarray(image_files.decode_image(encoded, name, "file"))
    if colour == 0 and depth in (2, 4):  # Pillow spreads them over 0 to 255
        ids = ids // (255 // (2**depth - 1))
    return ids.astype(np.uint16 if depth == 16 else np.uint8)
