"""Open-vocabulary semantic segmentation: the class of every pixel by names (inference/segmentation.py).

A pixel has the class of the largest cosine; docs/evaluate.md has the numbers and the public formats.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from etils import epy

from grain_jax import config
from grain_jax.core import errors
from grain_jax.evaluate.base import expanduser, option
from grain_jax.evaluate.evaluators import WithPrompts, faults_of

with epy.lazy_imports():
    import numpy as np
    import PIL.Image

    from grain_jax.core import images as image_files
    from grain_jax.evaluate import encode, segmentation_sets, zeroshot
    from grain_jax.inference import prompts, scores, stream
    from grain_jax.inference import segmentation as segmenting

# Known here, too, because a config may not import segmentation_sets.
FORMATS = ("folder", "ade20k", "voc")
_AT_ONCE = 16  # images whose windows and masks are in memory, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(WithPrompts):
    """Classes of pixels by the classes' names: mIoU and pixel accuracy."""

    example = "--format ade20k \\\n    --images ADEChallengeData2016"
    kind: str = "segmentation"
    images: str = option("", "Root of the dataset.", "DIR", required=True)
    format: str = option(
        FORMATS[0], "Layout of the dataset; folder: images/, masks/, classes.txt.", choices=FORMATS
    )
    ignore: int | None = option(
        None, "A further id whose pixels do not count, beside the format's.", "ID", low=0, high=65535
    )
    by: str = option(
        config.MAPS_BY[0],
        "Maps of patches, regions, or both; auto: what the model has.",
        choices=config.MAPS_BY,
    )
    patch_features: str = option(
        config.PATCH_FEATURES[0],
        "Values (MaskCLIP) or tokens; auto: tokens with a box head.",
        choices=config.PATCH_FEATURES,
    )
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

    @property
    def needs(self) -> tuple[str, ...]:
        return ("decoder",) if self.by in ("regions", "both") else ()

    @property
    def files(self) -> tuple[Any, ...]:
        return *super().files, f"{self.images}/classes.txt"

    def open(self) -> segmentation_sets.Segmented:
        """The images, masks and classes; raises as segmentation_sets.open_set."""
        if not self.images:
            raise errors.MissingData("images: got nothing, expected a folder of images and masks")
        opened = segmentation_sets.open_set(expanduser(self.images), self.format, self.ignore, self.get)
        if self.background_threshold is not None and opened.background is None:
            raise errors.UserError(
                f"background_threshold: got {self.background_threshold:g}, expected a set with the class"
                f" {segmentation_sets.BACKGROUND!r}; its classes begin with {', '.join(opened.labels[:3])}"
            )
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
        return faults_of(
            lambda: segmenting.check_stride(model.image.image_size, self.short_side, self.stride),
            lambda: segmenting.maps_by(model, self.by, self.patch_features),
        )

    def _described(self, opened: segmentation_sets.Segmented) -> list[list[str]] | None:
        if self.described_by is None:
            return None
        return zeroshot.read_descriptions(self.described_by, opened.labels, opened.names)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Gives every pixel a class and compares it with its mask.

        An image whose mask is missing, damaged, of another size or has an id that is no class is left out.

        Returns: counts; `miou`, the mean IoU over the `classes_seen`, which have a true or a predicted pixel;
          `pixel_accuracy`; `mean_class_accuracy`, over the classes with a true pixel. `chance_miou` and
          `chance_pixel_accuracy` are the values if a class is drawn for each pixel; `per_class` is name ->
          `iou`, `accuracy`, `pixels`. Ignored pixels count nowhere.
        """
        opened = self.open()
        size = predictor.model.image.image_size
        segmenting.check_stride(size, self.short_side, self.stride)
        predictor.maps_by(self.by, self.patch_features)
        classes = segmenting.embed_classes(
            functools.partial(encode.encode_distinct, predictor),
            opened.names,
            prompts.load_templates(self.templates),
            self._described(opened),
        )
        skip = opened.background if self.background_threshold is not None else None
        options = (self.short_side, self.stride, len(opened.names))
        maps_by = dict(by=self.by, patch_features=self.patch_features)
        of_pixels: dict[str, Any] = dict(
            background=self.background_threshold, scale=predictor.logit_scale, skip=skip
        )

        def prepare(position: int, image: PIL.Image.Image) -> tuple[Any, np.ndarray]:
            mask = segmentation_sets.read_mask(opened.masks[position], opened.class_of, image.size)
            try:
                return segmenting.cut(image, size, *options), mask
            except image_files.ImageError as error:
                name = opened.images[position].name
                raise image_files.ImageError(f"{name}: {error}") from None

        def count(batch: encode.Batch) -> dict[str, np.ndarray]:
            windows, masks = zip(*batch.pixels)
            maps_of = lambda part: (predictor.class_maps(part, classes, **maps_by),)
            (maps,) = scores.in_parts(maps_of, np.concatenate([x.pixels for x in windows]))
            stream.check_finite(maps)
            maps = np.split(maps, np.cumsum([len(each.pixels) for each in windows])[:-1])
            pixels = []
            for cells, each, mask in zip(maps, windows, masks, strict=True):
                labels = segmenting.labels(cells, each, **of_pixels)
                if skip is not None:
                    labels[labels == segmenting.BACKGROUND] = skip
                pixels.append(count_pixels(mask, labels, len(opened.names)))
            return {"index": batch.index, "pixels": np.stack(pixels)}

        arrays, unreadable = encode.over_images(
            opened.images, prepare, count, label="segmentation", batch_size=min(self.batch_size, _AT_ONCE)
        )
        pixels = arrays["pixels"].sum(axis=0)
        if not pixels.any():
            raise errors.UserError(f"{self.images}: every pixel has the ignored id")
        return {
            "kind": self.kind,
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
