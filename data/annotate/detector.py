"""The open-vocabulary detector, OWLv2: finds the box of each description.

Its boxes are shares of a square that the image was padded to, and are mapped back to the image.
"""

import types
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
from etils import epy

from grain_jax.core import annotations
from grain_jax.data.annotate import chat, checkpoint
from grain_jax.data.annotate.arguments import Annotate

with epy.lazy_imports():
    import torch

# A larger image is shrunk first: OWLv2 pads to a square of floats before it resizes, 4.8 GB for a
# panorama of 20,000 pixels. Twice the size that the models look at.
MAX_SIDE = 2048
MIN_SIDE = 1.0  # of a box, in pixels of the image
MERGE_IOU = 0.5  # of two boxes of a description that overlap more, the better one stays


class Detector:
    """Grounds descriptions in images.

    Raises:
      CheckpointError: the model cannot be loaded, or is no OWLv2.
    """

    def __init__(self, given: Annotate):
        self._model, self._processor, self._device = checkpoint.load(
            given.detector,
            "AutoModelForZeroShotObjectDetection",
            half=False,  # a box needs more than bfloat16's 8 bits
        )
        kind = self._model.config.model_type
        if kind != "owlv2":
            raise checkpoint.CheckpointError(
                f"{given.detector}: a detector of the kind {kind!r}, expected owlv2"
            )
        self._threshold = given.threshold
        self._batches = checkpoint.Batches(given.batch_size)

    def detect(
        self, images: Sequence[PIL.Image.Image], descriptions: Sequence[Sequence[str]]
    ) -> list[list[annotations.Region] | chat.Failure]:
        """The regions of each image, best first.

        Args:
          images: of any size and mode.
          descriptions: those of each image; an image without any has no region and is not run.

        Returns:
          For each image its boxes above the threshold, each with the one description that it fits
          best, in pixels of the image as it is passed (its EXIF orientation is applied before), clipped
          to it, duplicates merged; or why there are none: "out of memory", "model error".
        """
        wanted = {
            index: (image, tuple(dict.fromkeys(texts)))
            for index, (image, texts) in enumerate(zip(images, descriptions, strict=True))
            if texts
        }
        found = dict(zip(wanted, self._batches.run(self._ground, list(wanted.values()))))
        return [found.get(index, []) for index in range(len(images))]

    def _ground(
        self, batch: Sequence[tuple[PIL.Image.Image, tuple[str, ...]]]
    ) -> list[list[annotations.Region]]:
        shown = [_plain(image) for image, _ in batch]
        # The text tower has 16 positions and fails on a longer text. Shorter lists are filled up with " ".
        inputs = self._processor(
            images=shown,
            text=[list(descriptions) for _, descriptions in batch],
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
            device=self._device,
        ).to(self._device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        regions = []
        for index, (image, descriptions) in enumerate(batch):
            # Without the fill: the model takes it for a description, which could win a box.
            logits = outputs.logits[index : index + 1, :, : len(descriptions)]
            found = self._processor.image_processor.post_process_object_detection(
                # [1, boxes, descriptions]; [1, boxes, 4] cxcywh, in the model's own share of an image.
                types.SimpleNamespace(
                    logits=logits, pred_boxes=outputs.pred_boxes[index : index + 1]
                ),
                threshold=self._threshold,
                target_sizes=[(shown[index].height, shown[index].width)],
            )[0]
            scale = np.array([p / s for p, s in zip(image.size, shown[index].size)] * 2)
            boxes_xyxy = found["boxes"].cpu().numpy() * scale
            labels = [descriptions[label] for label in found["labels"].tolist()]
            scored = zip(found["scores"].tolist(), boxes_xyxy.tolist(), labels)
            regions.append(kept(scored, image.size))
        return regions


def _plain(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image without metadata: a processor could apply the EXIF orientation, which would rotate the boxes."""
    plain = PIL.Image.fromarray(np.asarray(image.convert("RGB")))
    plain.thumbnail((MAX_SIDE, MAX_SIDE))
    return plain


def kept(
    scored: Iterable[tuple[float, Sequence[float], str]], size: tuple[int, int]
) -> list[annotations.Region]:
    """Clips boxes to an image of (width, height) pixels; of each description's, overlapping ones merge.

    Args:
      scored: score, box_xyxy in pixels, description.
      size: of the image.

    Returns: the regions, best first.
    """
    regions: list[annotations.Region] = []
    for score, box, description in sorted(scored, key=lambda entry: -entry[0]):
        if _least_side(box) <= 0:
            continue
        x1, y1, x2, y2 = box
        clipped = annotations.clip_box((x1, y1, x2, y2), *size).box_xyxy
        # None: most of it lies beside the image, in the padding.
        if clipped is None or _least_side(clipped) < MIN_SIDE:
            continue
        region = annotations.Region(clipped, description, score)
        if not any(
            better.description == description and _iou(better.box_xyxy, region.box_xyxy) > MERGE_IOU
            for better in regions
        ):
            regions.append(region)
    return regions


def _least_side(box_xyxy: Sequence[float]) -> float:
    return min(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1])


def _iou(a: annotations.Box, b: annotations.Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return width * height / (sum(areas) - width * height)
