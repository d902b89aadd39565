"""The open-vocabulary detector: finds the box of each description.

Boxes must be mapped back to the image, which differs between models: OWLv2's boxes are shares of a square
that the image was padded to, Grounding DINO's are shares of the image without its padding.
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
      CheckpointError: the model cannot be loaded, or is of no kind that this module knows.
    """

    def __init__(self, given: Annotate):
        self._model, self._processor, self._device = checkpoint.load(
            given.detector,
            "AutoModelForZeroShotObjectDetection",
            half=False,  # a box needs more than bfloat16's 8 bits
        )
        kind = self._model.config.model_type
        if kind not in _KINDS:
            raise checkpoint.CheckpointError(
                f"{given.detector}: a detector of the kind {kind!r}, expected one of {', '.join(_KINDS)}"
            )
        self._inputs, self._scores = _KINDS[kind]
        self._threshold = given.threshold
        self._batches = checkpoint.Batches(given.at_once)

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
        texts = [descriptions for _, descriptions in batch]
        inputs = self._inputs(self._processor, self._model.config, shown, texts, self._device)
        inputs = inputs.to(self._device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        regions = []
        for index, (image, descriptions) in enumerate(batch):
            logits = self._scores(self._processor, inputs, outputs.logits, index, len(descriptions))
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


def _owl_inputs(processor, config, images, texts, device):
    # The text tower has 16 positions and fails on a longer text. Shorter lists are filled up with " ".
    return processor(
        images=images,
        text=[list(descriptions) for descriptions in texts],
        padding="max_length",
        truncation=True,
        max_length=config.text_config.max_position_embeddings,
        return_tensors="pt",
        device=device,
    )


def _owl_scores(processor, inputs, logits, index: int, descriptions: int):
    # Without the fill: the model takes it for a description, which could win a box.
    del processor, inputs
    return logits[index : index + 1, :, :descriptions]


def _dino_inputs(processor, config, images, texts, device):
    # One text an image, descriptions between full stops. The model takes "." and "?" for the end of one
    # wherever they stand, so none may have any.
    return processor(
        images=images,
        text=[
            " ".join(
                " ".join(text.lower().replace(".", " ").replace("?", " ").split()) + " ."
                for text in descriptions
            )
            for descriptions in texts
        ],
        padding=True,
        truncation=True,
        max_length=config.max_text_len,
        return_tensors="pt",
        device=device,
    )


def _dino_scores(processor, inputs, logits, index: int, descriptions: int):
    # Logits are of tokens. A description's is its best token's, so that a box's score is what the model's
    # own post-processing gives; that one, though, decodes phrases, which need not be any description.
    tokens = inputs["input_ids"][index]
    stop = processor.tokenizer.convert_tokens_to_ids(".")
    special = torch.tensor([stop, *processor.tokenizer.all_special_ids], device=tokens.device)
    owner = torch.where(torch.isin(tokens, special), -1, torch.cumsum(tokens == stop, dim=0))
    rows = logits[index, :, : len(tokens)]
    scores = [
        rows.masked_fill(owner != number, float("-inf")).amax(dim=-1)
        for number in range(descriptions)
    ]
    return torch.stack(scores, dim=-1)[None]


# The kinds of detectors: what each needs of images and descriptions, and its scores of an image's boxes.
_KINDS = {
    "owlv2": (_owl_inputs, _owl_scores),
    "grounding-dino": (_dino_inputs, _dino_scores),
    "mm-grounding-dino": (_dino_inputs, _dino_scores),
}
