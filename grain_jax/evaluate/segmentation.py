"""Open-vocabulary semantic segmentation: the class of every pixel by names (inference/segmentation.py).

A pixel has the class of the largest cosine; docs/evaluate.md has the numbers. A dataset is a folder of images
and masks, ADE20K or Pascal VOC. A mask is a PNG of one channel, grey or with a palette, of 1 to 16 bits, as
large as its image. Its numbers are ids: a `Layout` says which of them are classes, and which do not count.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from etils import epy

from grain_jax import config
from grain_jax.core import errors
from grain_jax.evaluate.base import expanduser, how_to_get, option
from grain_jax.evaluate.evaluators import WithPrompts, faults_of

with epy.lazy_imports():
    import numpy as np
    import PIL.Image
    from etils import epath

    from grain_jax.core import images as image_files
    from grain_jax.core import regular_file
    from grain_jax.evaluate import class_names, encode, test_sets, zeroshot
    from grain_jax.inference import prompts
    from grain_jax.inference import segmentation as segmenting

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
    "voc": Layout("JPEGImages", "SegmentationClass", 255, "pascal_voc", 0, "ImageSets/Segmentation/val.txt"),
}


class Segmented(NamedTuple):
    """Images with masks, and the classes."""

    images: list[test_sets.Image]  # to be read in the orientation of their masks
    masks: list[epath.Path]
    names: list[str]  # for each class, in order; commas divide alternatives
    labels: list[str]  # the first name of each class
    class_of: np.ndarray  # int32 [_IDS], id -> position of the class, IGNORED or OUTSIDE
    background: int | None  # the position of the class `background`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(WithPrompts):
    """Classes of pixels by the classes' names: mIoU and pixel accuracy."""

    example = "--format ade20k \\\n    --images ADEChallengeData2016"
    kind: str = "segmentation"
    images: str = option("", "Root of the dataset.", "DIR", required=True)
    format: str = option("folder", "Layout; folder: images/, masks/, classes.txt.", choices=tuple(LAYOUTS))
    ignore: int | None = option(None, "A further id that does not count.", "ID", low=0, high=65535)
    by: str = option("auto", "Patches, regions or both; auto: what the model has.", choices=config.MAPS_BY)
    patch_features: str = option(
        "auto", "Values (MaskCLIP) or tokens; auto: tokens with a box head.", choices=config.PATCH_FEATURES
    )
    short_side: int = option(0, "Pixels of the shorter side; 0: the model's size.", "PIXELS", low=0)
    stride: int = option(0, "Pixels between windows; 0: half a window.", "PIXELS", low=0)
    background_threshold: float | None = option(
        None, "A pixel is background if no other class has this share.", "P", low=0, high=1
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("regions",) if self.by in ("regions", "both") else ()

    @property
    def files(self) -> tuple[Any, ...]:
        return *super().files, f"{self.images}/classes.txt"

    def open(self) -> Segmented:
        """The images, masks and classes; raises as open_set."""
        if not self.images:
            raise errors.MissingData("images: got nothing, expected a folder of images and masks")
        opened = open_set(expanduser(self.images), self.format, self.ignore, self.get)
        if self.background_threshold is not None and opened.background is None:
            got = f"background_threshold: got {self.background_threshold:g}, expected a set with the class"
            labels = ", ".join(opened.labels[:3])
            raise errors.UserError(f"{got} {BACKGROUND!r}; its classes begin with {labels}")
        return opened

    def check(self, model: Any = None) -> int:
        opened = self.open()
        faults = faults_of(lambda: self._described(opened), lambda: prompts.load_templates(self.templates))
        if model is not None:
            faults += self.faults_of_model(model)
        config.raise_faults(faults)
        return len(opened.masks)

    def faults_of_model(self, model: Any) -> list[str]:
        """Why a model cannot make these maps."""
        size, check = model.image.image_size, segmenting.check_stride
        maps_by = lambda: segmenting.maps_by(model, self.by, self.patch_features)
        return faults_of(lambda: check(size, self.short_side, self.stride), maps_by)

    def _described(self, opened: Segmented) -> list[list[str]] | None:
        if self.described_by is None:
            return None
        return zeroshot.read_descriptions(self.described_by, opened.labels, opened.names)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Gives every pixel a class; an image whose mask cannot be used is left out.

        Returns: counts; `miou`, the mean IoU over the `classes_seen`, which have a true or a predicted pixel;
          `pixel_accuracy`; `mean_class_accuracy`, over the classes with a true pixel. `chance_miou` and
          `chance_pixel_accuracy` are the values if a class is drawn for each pixel; `per_class` is name ->
          `iou`, `accuracy`, `pixels`. Ignored pixels count nowhere.
        """
        opened = self.open()
        cuts = dict(short_side=self.short_side, stride=self.stride)
        classes = segmenting.embed_classes(
            functools.partial(encode.encode_distinct, predictor),
            opened.names,
            prompts.load_templates(self.templates),
            self._described(opened),
        )
        skip = opened.background if self.background_threshold is not None else None

        def prepare(position: int, image: PIL.Image.Image) -> tuple[Any, np.ndarray]:
            mask = read_mask(opened.masks[position], opened.class_of, image.size)
            size, count = predictor.model.image.image_size, len(opened.names)
            try:
                return segmenting.cut(image, size, **cuts, classes=count), mask
            except image_files.ImageError as error:
                name = opened.images[position].name
                raise image_files.ImageError(f"{name}: {error}") from None

        def count(batch: encode.Batch) -> dict[str, np.ndarray]:
            windows, masks = zip(*batch.pixels)
            options: dict[str, Any] = dict(by=self.by, patch_features=self.patch_features, skip=skip, **cuts)
            options["background"], pixels = self.background_threshold, []
            for mask, labels in zip(masks, predictor.segment(windows, classes, **options), strict=True):
                labels[labels == segmenting.BACKGROUND] = skip or 0
                pixels.append(count_pixels(mask, labels, len(opened.names)))
            return {"index": batch.index, "pixels": np.stack(pixels)}

        read: dict[str, Any] = dict(label=self.kind, batch_size=min(self.batch_size, segmenting.AT_ONCE))
        arrays, unreadable = encode.over_images(opened.images, prepare, count, **read)
        pixels = arrays["pixels"].sum(axis=0)
        if not pixels.any():
            raise errors.UserError(f"{self.images}: every pixel has the ignored id")
        return {
            "format": self.format,
            "images": len(arrays["index"]),
            **encode.report_unreadable(unreadable),
            "classes": len(opened.names),
            **measures(pixels, opened.labels, skip if self.background_threshold == 0 else None),
        }


def count_pixels(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Right, true and predicted pixels of each class, int64 [3, C]; negative classes do not count."""
    known = truth >= 0
    truth, predicted = truth[known], predicted[known]
    each = truth[truth == predicted], truth, predicted
    return np.stack([np.bincount(labels, minlength=classes) for labels in each])


def measures(pixels: np.ndarray, labels: list[str], without: int | None = None) -> dict[str, Any]:
    """The part of a result about `count_pixels`, summed; chance never guesses the class `without`."""
    right, true, predicted = pixels.astype(np.float64)
    union = true + predicted - right
    share = lambda a, b: np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)
    ious, accuracies = share(right, union), share(right, true)
    guess = np.array([i != without for i in range(len(true))], np.float64)  # chance of each class
    guess /= guess.sum()
    chance_ious = share(true * guess, true * (1 - guess) + true.sum() * guess)
    return {
        "classes_seen": int((union > 0).sum()),
        "pixels": int(true.sum()),
        "miou": float(np.nanmean(ious)),
        "pixel_accuracy": float(right.sum() / true.sum()),
        "mean_class_accuracy": float(np.nanmean(accuracies)),
        "chance_miou": float(np.nanmean(chance_ious)),
        "chance_pixel_accuracy": float(true @ guess / true.sum()),
        "per_class": {
            label: {
                "iou": float(iou) if u else None,
                "accuracy": float(accuracy) if t else None,
                "pixels": int(t),
            }
            for label, iou, accuracy, u, t in zip(labels, ious, accuracies, union, true)
        },
    }


def open_set(images: str, layout: str, ignore: int | None = None, get: str | None = None) -> Segmented:
    """Finds the images, masks and classes of a dataset; no image is read.

    Args:
      images, layout: the root of the dataset, and a name in LAYOUTS.
      ignore: a further id that does not count, even if it is a class.
      get: how to get the data, for errors.MissingData: a folder or the list of images is not there.

    Raises errors.UserError: no mask, two classes of one name, or a class file that cannot be used.
    """
    root, spec = epath.Path(images), LAYOUTS[layout]
    of_images, of_masks, listed = root / spec.images, root / spec.masks, root / spec.listed
    for path in (of_images, of_masks, listed):
        if not path.exists():
            expected = f"one of the format {layout}{how_to_get(get)}"
            raise errors.MissingData(f"{path}: no such file or folder, expected {expected}")
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
        raise errors.UserError(f"{of_images}: none of its {len(masks)} images has a mask in {of_masks}")
    opened = [test_sets.of_path(path, orientation=spec.orientation) for path in paths]
    background = labels.index(BACKGROUND) if BACKGROUND in labels else None
    return Segmented(opened, masks, names, labels, class_of, background)


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
    labels = [(segmenting.alternatives(name) or [name])[0] for name in names]
    labels = [n if labels.count(label) > 1 else label for n, label in zip(names, labels)]
    if twice := class_names.twice(labels):
        raise errors.UserError(f"classes {classes}: got {twice!r} twice, expected it once")
    return names, labels


def read_mask(path: epath.Path, class_of: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel, int32 [H, W]: its position, or IGNORED; `class_of` as in Segmented.

    Raises ImageError: the mask is missing, not a PNG of one channel, of another size (width, height) than the
    image, or has an id that is no class.
    """
    try:
        encoded = image_files.read_file(path)
    except OSError as error:
        raise image_files.ImageError(f"{path}: {error.strerror or error}") from None
    ids = decode_mask(encoded, str(path), size)
    classes = class_of[ids]
    if (outside := np.unique(ids[classes == OUTSIDE])).size:
        got = test_sets.listed(list(map(str, outside)), 5)
        expected = f"those of the {class_of.max() + 1} classes or ignored ones"
        raise image_files.ImageError(f"{path}: got the ids {got}, expected {expected}")
    return classes


def decode_mask(encoded: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """The ids in a mask, uint8 or uint16 [H, W]; raises as `read_mask`."""
    image = image_files.open_image(encoded, name)
    if image.size != size:
        raise image_files.ImageError(f"{name}: got {image.size} pixels, expected {size}, as the image has")
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        got = f"{image.format}, mode {image.mode}"
        raise image_files.ImageError(f"{name}: got {got}, expected a PNG of one channel, grey or palette")
    depth, colour = encoded[24], encoded[25]
    ids = np.asarray(image_files.decode_image(encoded, name, "file"))
    if colour == 0 and depth in (2, 4):  # Pillow spreads them over 0 to 255
        ids = ids // (255 // (2**depth - 1))
    return ids.astype(np.uint16 if depth == 16 else np.uint8)
