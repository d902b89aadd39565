"""The open-vocabulary detector, OWLv2: finds the box of each description.

Its boxes are shares of a square that the image was padded to, and are mapped back to the image.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
from etils import epy

from grain_jax.core import annotations, errors
from grain_jax.data.annotate import chat, local_models
from grain_jax.data.annotate.arguments import Annotate

with epy.lazy_imports():
    import torch

# A larger image is shrunk first: OWLv2 pads to a square of floats before it resizes, 4.8 GB for a
# panorama of 20,000 pixels. Twice the size that the models look at.
MAX_SIDE = 2048
MIN_SIDE = 1.0  # of a box, in pixels of the image
MERGE_IOU = 0.5  # if two boxes of a description overlap more, the better one stays


class Detector:
    """Grounds descriptions in images. Raises UserError: the model cannot be loaded, or is no OWLv2."""

    def __init__(self, args: Annotate):
        self._model, self._processor, self._device = local_models.load(
            args.detector,
            "AutoModelForZeroShotObjectDetection",
            half=False,  # a box needs more than bfloat16's 8 bits
        )
        kind = self._model.config.model_type
        if kind != "owlv2":
            raise errors.UserError(f"{args.detector}: got {kind!r}, expected an owlv2")
        self._threshold, self._batch_size = args.threshold, args.batch_size

    def detect(
        self, images: Sequence[PIL.Image.Image], descriptions: Sequence[Sequence[str]]
    ) -> list[list[annotations.Region] | chat.Failure]:
        """The regions of each image, best first.

        Args:
          images: of any size and mode.
          descriptions: at least one per image.

        Returns: per image its boxes above the threshold, each with the one description that it fits best. Or
          why there are none: "out of memory", "model error". Boxes are in pixels of the image, clipped to it.
        """
        pairs = list(zip(images, descriptions, strict=True))
        return local_models.in_batches(self._ground, pairs, self._batch_size)

    def _ground(
        self, batch: Sequence[tuple[PIL.Image.Image, Sequence[str]]]
    ) -> list[list[annotations.Region]]:
        # The text tower has 16 positions and fails on a longer text. Shorter lists are filled up with " ".
        inputs = self._processor(
            images=[_plain(image) for image, _ in batch],
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
        for (image, descriptions), logits, boxes in zip(batch, outputs.logits, outputs.pred_boxes):
            # Without the fill: the model takes it for a description, which could win a box.
            scores, labels = logits[:, : len(descriptions)].sigmoid().max(dim=-1)
            shown = scores > self._threshold
            # Centre, then width and height, as shares of the padded square.
            centre, sides = boxes[shown].split(2, dim=-1)
            corners = torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], dim=-1)
            boxes_xyxy = (corners * max(image.size)).tolist()
            names = [descriptions[label] for label in labels[shown].tolist()]
            regions.append(merged(zip(scores[shown].tolist(), boxes_xyxy, names), *image.size))
        return regions


def _plain(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image without metadata: a processor could turn it, and so the boxes, by its EXIF orientation."""
    plain = PIL.Image.fromarray(np.asarray(image.convert("RGB")))
    plain.thumbnail((MAX_SIDE, MAX_SIDE))
    return plain


def merged(
    scored: Iterable[tuple[float, Sequence[float], str]], width: int, height: int
) -> list[annotations.Region]:
    """Clips boxes to their image of that size; of the boxes of a description that overlap, the best stays.

    `scored` has score, box_xyxy in pixels, description. Returns the regions, best first.
    """
    regions: list[annotations.Region] = []
    for score, (x1, y1, x2, y2), description in sorted(scored, key=lambda entry: -entry[0]):
        if min(x2 - x1, y2 - y1) <= 0:
            continue
        box, _ = annotations.clip_box((x1, y1, x2, y2), width, height)
        # None: most of it lies beside the image, in the padding.
        if box is None or min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            continue
        better = [region.box_xyxy for region in regions if region.description == description]
        if all(annotations.iou(other, box) <= MERGE_IOU for other in better):
            regions.append(annotations.Region(box, description, score))
    return regions
