"""Open-vocabulary semantic segmentation: the class of every pixel by the names of classes (inference/segmentation.py).

A pixel has the class of the largest cosine; docs/evaluate.md has the numbers and the formats of the public datasets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import STANDALONE, Context, Evaluator, TableRow, expanduser, option
from grain_jax.evaluate.evaluators import Faults, without_missing_descriptions

with epy.lazy_imports():
    import numpy as np
    import PIL.Image

    from grain_jax.core import images as image_files
    from grain_jax.evaluate import confusion, encode, segmentation_sets, zeroshot
    from grain_jax.inference import prompts, scores, stream
    from grain_jax.inference import segmentation as segmenting

# Known here, too, because a config may not import the modules above.
FORMATS = ("folder", "ade20k", "voc", "context59", "context60", "cityscapes", "coco_stuff")
LISTED = ("voc", "context59", "context60")  # formats whose split is a list of names
WAYS = ("auto", "patches", "regions", "both")
PATCHES = ("auto", "values", "tokens")
_AT_ONCE = 16  # images whose windows and masks are in memory, at most
_THREADS = 2  # that make maps as large as images, if they take at most segmenting.MAX_NUMBERS

_PIXELS = "pictures", "pictures"  # count and unit of table rows


def _parse_sides(text: str) -> tuple[int, ...]:
    sides = tuple(int(side) for side in text.split(",") if side.strip().isdecimal())
    if not sides or len(sides) != text.count(",") + 1:
        raise ValueError(f"got {text!r}, expected numbers of patches, such as 1,2,3")
    return sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
    """Classes of pixels by the classes' names: mIoU and pixel accuracy."""

    example = "--format ade20k \\\n    --images ADEChallengeData2016"
    table = (
        TableRow("miou", "mIoU", "chance_miou", *_PIXELS),
        TableRow("pixel_accuracy", "pixel accuracy", "chance_pixel_accuracy", *_PIXELS),
        TableRow("mean_class_accuracy", "mean class accuracy", "chance_pixel_accuracy", *_PIXELS),
    )
    kind: str = "segmentation"
    images: str = option(
        "", "Root of the dataset; with masks, the folder of the images.", "DIR", required=True
    )
    masks: str | None = option(
        None, "Folder of masks, PNGs of one channel; default: the format's, or DIR/masks.", "DIR"
    )
    format: str = option(
        FORMATS[0], "Layout of the dataset; folder: images/, masks/, classes.txt.", choices=FORMATS
    )
    split: str | None = option(None, "Split of the dataset; default: the validation split.", "NAME")
    classes: str | None = option(
        None, "File of class names by id, commas between names of a class.", "FILE"
    )
    ignore: int | None = option(
        None,
        "Id of pixels that do not count, for the format folder; default: 255 if it is no class.",
        "ID",
        low=0,
        high=65535,
    )
    descriptions: str | None = option(
        None, "File {class name: [description, ...]}; default: classes by names alone.", "D.json"
    )
    templates: str | None = option(
        None, "File of prompts, one per line; default: inference/templates.txt.", "FILE"
    )
    unit_features: bool = option(
        True, "Whether class features have unit length; else they are means of their prompts."
    )
    by: str = option(
        WAYS[0], "Maps of patches, regions, or both; auto: what the model has.", choices=WAYS
    )
    patch_features: str = option(
        PATCHES[0], "Values (MaskCLIP) or tokens; auto: tokens with a box head.", choices=PATCHES
    )
    patch_sides: tuple[int, ...] = option(
        (1, 2, 3), "Widths of the boxes whose mean is a patch.", "N,N", parse=_parse_sides
    )
    patch_weight: float = option(0.5, "Share of the patches with --by both.", "W", low=0, high=1)
    short_side: int = option(
        0, "Pixels of the shorter side after resizing; 0: the model's size.", "PIXELS", low=0
    )
    stride: int = option(0, "Pixels between windows; 0: half a window.", "PIXELS", low=0)
    background_threshold: float | None = option(
        None,
        "A pixel is background if no other class has this share; default: a name like others.",
        "P",
        low=0,
        high=1,
    )

    def faults(self) -> list[str]:
        if self.format == FORMATS[0] and self.split is not None:
            return [f"split: got {self.split!r} with format='folder', expected none"]
        if not self.patch_sides or min(self.patch_sides) < 1:
            return [f"patch_sides: got {self.patch_sides}, expected numbers of patches, 1 or more"]
        if self.masks and (self.split is not None or self.format in LISTED):
            return [
                f"masks: got {self.masks!r} with format={self.format!r}, expected none: the split is found below images"
            ]
        return []

    def misses(self, model: Any) -> list[str]:
        attempt = Faults()
        attempt(segmenting.check_stride, model.image.image_size, self.short_side, self.stride)
        if not self.needs_regions or model.decoder is not None:  # else the config says it
            attempt(segmenting.maps_by, model, self.by, self.patch_features)
        return [str(fault) for fault in attempt.faults]

    @property
    def needs_regions(self) -> bool:
        return self.by in ("regions", "both")

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.images, self.masks

    @property
    def files(self) -> tuple[str | None, ...]:
        classes = self.classes
        if classes is None and self.format == FORMATS[0]:
            classes = segmentation_sets.classes_beside(expanduser(self.images), self.masks)
        return classes, self.descriptions, self.templates

    def available(self) -> tuple[typing.Self, str]:
        super().available()
        return without_missing_descriptions(self)

    def open(self) -> segmentation_sets.Segmented:
        """The images, masks and classes; raises as segmentation_sets.open_set."""
        if lines := self.faults():  # flags are not checked as a config
            raise errors.UserError("\n".join(lines))
        if not self.images:
            raise errors.MissingData("images: got nothing, expected a folder of images and masks")
        opened = segmentation_sets.open_set(
            expanduser(self.images),
            self.masks,
            layout=self.format,
            split=self.split,
            classes=self.classes,
            ignore=self.ignore,
            get=self.get,
        )
        if self.background_threshold is not None and opened.background is None:
            raise errors.UserError(
                f"background_threshold: got {self.background_threshold:g}, expected a set with the class"
                f" {segmentation_sets.BACKGROUND!r}; its classes begin with {', '.join(opened.labels[:3])}"
            )
        return opened

    def check(self) -> int:
        attempt = Faults()
        opened = attempt(self.open)
        if opened and self.descriptions is not None:
            attempt(self._described, opened)
        attempt(prompts.load_templates, self.templates)
        attempt.done()
        return len(opened.pairs) if opened else 0

    def _described(self, opened: segmentation_sets.Segmented) -> list[list[str]] | None:
        if self.descriptions is None:
            return None
        return zeroshot.read_descriptions(self.descriptions, opened.labels, opened.names)

    def embed_classes(self, predictor: Any, opened: segmentation_sets.Segmented) -> Any:
        """inference.segmentation.Classes of a set. Raises errors.UserError if the model cannot use the options."""
        size = predictor.model.image.image_size
        segmenting.check_stride(size, self.short_side, self.stride)
        predictor.maps_by(self.by, self.patch_features)
        return segmenting.embed_classes(
            functools.partial(encode.encode_distinct, predictor),
            opened.names,
            prompts.load_templates(self.templates),
            self._described(opened),
            self.unit_features,
        )

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Gives every pixel a class and compares it with its mask.

        An image whose mask is missing, damaged, of another size or has an id that is no class is left out.

        Returns: counts; `miou`, the mean IoU over the `classes_seen`, which have a true or a predicted pixel;
          `pixel_accuracy`; `mean_class_accuracy`, over the classes with a true pixel. Each has a 95% interval (`_low`,
          `_high`) if there are five or more images. `chance_miou` and `chance_pixel_accuracy` are the values if a class
          is drawn for each pixel; `per_class` is name -> `iou`, `accuracy`, `pixels`. Ignored pixels count nowhere.
        """
        opened = self.open()
        classes = self.embed_classes(predictor, opened)
        table = confusion.Confusion(len(opened.names))
        options = (self.short_side, self.stride, len(opened.names))

        def prepare(position: int, image: PIL.Image.Image) -> tuple[Any, np.ndarray]:
            pair = opened.pairs[position]
            mask = segmentation_sets.read_mask(pair, image.size)
            try:
                return segmenting.cut(image, predictor.model.image.image_size, *options), mask
            except image_files.ImageError as error:
                raise image_files.ImageError(f"{pair.image}: {error}") from None

        def count(batch: encode.Batch) -> dict[str, np.ndarray]:
            windows, masks = zip(*batch.pixels)
            predicted = self.labels(predictor, windows, classes, opened.background)
            for position, mask, labels in zip(batch.index, masks, predicted, strict=True):
                table.add(int(position), confusion.counts(mask, labels, len(opened.names)))
            return {"index": batch.index}

        # The masks of the public datasets are of the pixels as they are stored.
        orientation = "exif" if self.format == FORMATS[0] else "file"
        arrays, unreadable = encode.over_images(
            opened.images(orientation),
            prepare,
            count,
            label="segmentation",
            batch_size=min(context.batch_size, _AT_ONCE),
        )
        table = table.gathered()
        if not table.matrix.sum():
            raise errors.UserError(f"{self.images}: every pixel has the ignored id")
        right, true, guessed = confusion.parts(table.matrix)
        return {
            "kind": self.kind,
            "format": self.format,
            "pictures": len(arrays["index"]),
            **encode.report_unreadable(unreadable),
            "classes": len(opened.names),
            "classes_seen": int((true + guessed - right > 0).sum()),
            "pixels": int(true.sum()),
            **table.measures(opened.background if self.background_threshold == 0 else None),
            "per_class": table.per_class(opened.labels),
        }

    def labels(
        self, predictor: Any, windows: Any, classes: Any, background: int | None
    ) -> Iterator[np.ndarray]:
        """For each image, given by its windows, the class of each pixel, int32 [H, W]."""
        maps_of = functools.partial(
            predictor.class_maps,
            classes=classes,
            by=self.by,
            patch_features=self.patch_features,
            patch_weight=self.patch_weight,
            patch_sides=self.patch_sides,
        )
        pixels = np.concatenate([each.pixels for each in windows])
        (maps,) = scores.in_parts(lambda part: (maps_of(part),), pixels)
        stream.check_finite(maps)
        maps = np.split(maps, np.cumsum([len(each.pixels) for each in windows])[:-1])
        skip = background if self.background_threshold is not None else None

        def labels_of(pair: tuple[np.ndarray, Any]) -> np.ndarray:
            labels = segmenting.labels(
                *pair,
                background=self.background_threshold,
                scale=predictor.logit_scale,
                skip=skip,
            )
            if skip is not None:
                labels[labels == segmenting.BACKGROUND] = skip
            return labels

        largest = max(math.prod(each.canvas) for each in windows) * len(classes.names)
        threads = max(1, min(_THREADS, segmenting.MAX_NUMBERS // largest))
        with ThreadPoolExecutor(threads) as pool:
            yield from stream.ahead(labels_of, zip(maps, windows, strict=True), pool, threads)
