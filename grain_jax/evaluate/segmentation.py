"""Open-vocabulary semantic segmentation: the class of every pixel by the names of classes (inference/segmentation.py).

A pixel has the class of the largest cosine; docs/evaluate.md has the numbers and the formats of the public sets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epy

from grain_jax.core import errors, named
from grain_jax.evaluate.base import (
    STANDALONE,
    Context,
    Evaluator,
    TableRow,
    exists,
    expanduser,
    option,
)
from grain_jax.evaluate.evaluators import Faults

with epy.lazy_imports():
    import numpy as np

    from grain_jax.evaluate import confusion, encode, segmentation_sets, zeroshot
    from grain_jax.inference import prompts, scores, stream
    from grain_jax.inference import segmentation as segmenting

# Known here, too, because a config may not import the modules above.
FORMATS = ("folder", "ade20k", "voc", "context59", "context60", "cityscapes", "coco_stuff")
LISTED = ("voc", "context59", "context60")  # those whose split is a list of names
WAYS = ("auto", "patches", "regions", "both")
PATCHES = ("auto", "values", "tokens")
_AT_ONCE = 16  # images whose windows and masks are in memory, at most
_THREADS = 2  # that make maps as large as images, where they take at most segmenting.MAX_NUMBERS

_PIXELS = "pictures", "pictures"  # of the rows of the table


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
        FORMATS[0],
        "Layout of the dataset; folder: images/, masks/ and classes.txt.",
        choices=FORMATS,
    )
    split: str | None = option(None, "Split of the dataset; default: its validation split.", "NAME")
    classes: str | None = option(
        None,
        "File of class names by id, with commas between names of a class; default: the format's.",
        "FILE",
    )
    ignore: int | None = option(
        None,
        "Id of pixels that do not count, for format=folder; default: 255 if it is no class.",
        "ID",
        low=0,
        high=65535,
    )
    descriptions: str | None = option(
        None,
        "File of {class name: [description, ...]} to classify by; default: by names alone.",
        "D.json",
    )
    templates: str | None = option(
        None,
        "File of prompts, one per line, with {} for the name; default: inference/templates.txt.",
        "FILE",
    )
    unit_features: bool = option(
        True, "Whether class features have unit length; else they are means of their prompts."
    )
    by: str = option(
        WAYS[0],
        "Maps of patches, of query regions, or both; auto: what the model has.",
        choices=WAYS,
    )
    patch_features: str = option(
        PATCHES[0],
        "values (MaskCLIP) or tokens of the last layer; auto: tokens with a box head.",
        choices=PATCHES,
    )
    patch_sides: tuple[int, ...] = option(
        (1, 2, 3),
        "With a box head: a patch is the mean of boxes of these widths around it.",
        "N,N",
        parse=_parse_sides,
    )
    patch_weight: float = option(0.5, "Share of the patches in both.", "W", low=0, high=1)
    short_side: int = option(
        0, "Pixels of the shorter side after resizing; 0: the model's image size.", "PIXELS", low=0
    )
    stride: int = option(
        0, "Pixels between windows of the model's size; 0: half a window.", "PIXELS", low=0
    )
    background_threshold: float | None = option(
        None,
        "Background is where no other class reaches this share; default: it is a name as others.",
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
        size, decoder, by, found = model.image.image_size, model.decoder, self.by, []
        has_patches = not decoder or model.boxes.kind != "none"
        if by == "auto":  # as Predictor.maps_by
            by = "both" if has_patches else "regions" if decoder.queries else "patches"
        if self.short_side and self.short_side < size:
            found.append(
                f"short_side: got {self.short_side}, expected 0 or at least {size}, model.image.image_size"
            )
        if self.stride > size:
            found.append(
                f"stride: got {self.stride}, expected at most {size}, model.image.image_size"
            )
        if by != "regions" and not has_patches:
            found.append(
                f"by: got {self.by!r}, which asks patches, with model.decoder alone, expected a box head"
                " (model.boxes.kind), or by='regions' with region queries"
            )
        external = named.is_external(model.image.tower)
        if by != "regions" and external and self.patch_features == "values":
            found.append(
                f"patch_features: got 'values' with the tower {model.image.tower}, expected 'tokens'"
            )
        return found

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

    def available(self) -> tuple[Segmentation, str]:
        super().available()
        if self.missing != "skip" or self.descriptions is None:
            return self, ""
        path = expanduser(self.descriptions)
        if exists(path):
            return self, ""
        line = f"{path}: not there, expected descriptions of the classes; evaluated by names alone"
        return dataclasses.replace(self, descriptions=None), line

    def open(self) -> segmentation_sets.Segmented:
        """The images, masks and classes; raises as segmentation_sets.open_set."""
        if lines := self.faults():  # of flags, which are no config
            raise errors.UserError("\n".join(lines))
        if not self.images:
            raise errors.MissingData("images: got nothing, expected a folder of images and masks")
        found = segmentation_sets.open_set(
            expanduser(self.images),
            self.masks,
            layout=self.format,
            split=self.split,
            classes=self.classes,
            ignore=self.ignore,
            get=self.get,
        )
        if self.background_threshold is not None and found.background is None:
            raise errors.UserError(
                f"background_threshold: got {self.background_threshold:g}, expected a set with the class"
                f" {segmentation_sets.BACKGROUND!r}; its classes begin with {', '.join(found.labels[:3])}"
            )
        return found

    def check(self) -> int:
        attempt = Faults()
        found = attempt(self.open)
        if found and self.descriptions is not None:
            attempt(self._described, found)
        attempt(prompts.load_templates, self.templates)
        attempt.done()
        return len(found.pairs) if found else 0

    def _described(self, found: segmentation_sets.Segmented) -> list[list[str]] | None:
        if self.descriptions is None:
            return None
        return zeroshot.read_descriptions(self.descriptions, found.labels, found.names)

    def segmenter(self, predictor: Any, found: segmentation_sets.Segmented) -> Segmenter:
        """Embeds the classes of a set. Raises errors.UserError where the model cannot use the options."""
        size = predictor.model.image.image_size
        segmenting.check_stride(size, self.short_side, self.stride)
        predictor.maps_by(self.by, self.patch_features)
        classes = segmenting.embed_classes(
            functools.partial(encode.encode_distinct, predictor),
            found.names,
            prompts.load_templates(self.templates),
            self._described(found),
            self.unit_features,
        )
        skip = found.background if self.background_threshold is not None else None
        return Segmenter(self, predictor, classes, skip)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Gives every pixel a class and compares it with its mask.

        An image whose mask is missing, damaged, of another size or has an id that is no class is left out.

        Returns: counts; `miou`, the mean IoU over the `classes_seen`, those with a true or a predicted pixel;
          `pixel_accuracy`; `mean_class_accuracy`, over the classes with a true pixel; each with a 95% interval (`_low`,
          `_high`) over the images if there are five or more; `chance_miou` and `chance_pixel_accuracy`, of a class drawn for each pixel; and
          `per_class`, name -> `iou`, `accuracy`, `pixels`. Pixels of the ignored id count nowhere.
        """
        found, unreadable = self.open(), {}
        segmenter = self.segmenter(predictor, found)
        size, classes = predictor.model.image.image_size, len(found.names)
        table = confusion.Confusion(classes)

        def count(batch: encode.Encoded) -> None:
            windows, masks = zip(*batch.pixels)
            predicted = segmenter.labels(windows)
            for position, mask, own in zip(batch.index, masks, predicted, strict=True):
                table.add(int(position), confusion.counts(mask, own, classes))

        for _ in encode.encode_images(
            predictor,
            # The masks of the public sets are of the pixels as they are stored.
            found.images("exif" if self.format == FORMATS[0] else "file"),
            label="segmentation",
            unreadable=unreadable,
            embed=False,
            prepare=segmentation_sets.prepare(found.pairs, segmenter.cutter(size)),
            consume=count,
            batch_size=min(context.batch_size, _AT_ONCE),
        ):
            pass
        table = table.gathered()
        if not table.matrix.sum():
            raise errors.UserError(f"{self.images}: every pixel has the ignored id")
        right, true, guessed = confusion.parts(table.matrix)
        return {
            "kind": self.kind,
            "format": self.format,
            "pictures": len(found.pairs) - len(unreadable),
            **encode.report_unreadable(unreadable),
            "classes": classes,
            "classes_seen": int((true + guessed - right > 0).sum()),
            "pixels": int(true.sum()),
            **table.measures(segmenter.skip if self.background_threshold == 0 else None),
            "per_class": table.per_class(found.labels),
        }


class Segmenter(NamedTuple):
    """A model with the options of an evaluation and its classes."""

    entry: Segmentation
    predictor: Any
    classes: Any  # inference.segmentation.Classes
    skip: int | None  # the class that the threshold gives

    def cutter(self, size: int) -> Any:
        """A PIL image -> its windows of `size` pixels."""
        sides = dict(short_side=self.entry.short_side, stride=self.entry.stride)
        return functools.partial(
            segmenting.cut, size=size, classes=len(self.classes.names), **sides
        )

    def labels(self, windows: Any) -> Iterator[np.ndarray]:
        """For each image, given by its windows, the class of each pixel, int32 [H, W]."""
        entry = self.entry
        maps_of = functools.partial(
            self.predictor.class_maps,
            classes=self.classes,
            by=entry.by,
            patch_features=entry.patch_features,
            patch_weight=entry.patch_weight,
            patch_sides=entry.patch_sides,
        )
        pixels = np.concatenate([each.pixels for each in windows])
        (maps,) = scores.in_parts(lambda part: (maps_of(part),), pixels)
        stream.check_finite(maps)
        maps = np.split(maps, np.cumsum([len(each.pixels) for each in windows])[:-1])
        pairs = zip(maps, windows, strict=True)

        def labels_of(pair: tuple[np.ndarray, Any]) -> np.ndarray:
            found = segmenting.labels(
                *pair,
                background=entry.background_threshold,
                scale=self.predictor.logit_scale,
                skip=self.skip,
            )
            if self.skip is not None:
                found[found == segmenting.BACKGROUND] = self.skip
            return found

        largest = max(math.prod(each.canvas) for each in windows) * len(self.classes.names)
        threads = max(1, min(_THREADS, segmenting.MAX_NUMBERS // largest))
        with ThreadPoolExecutor(threads) as pool:
            yield from stream.ahead(labels_of, pairs, pool, threads)
