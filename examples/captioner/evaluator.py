"""An evaluator of the decoder: the boxes of phrases, and whether captions name what is there.

    c = ConfigDict()
    written = "examples.captioner.evaluator:Written"
    c.evals = dict(words=kinds.evaluator(written, "IMAGES", annotations="A.jsonl"))

is a suite for `grain-jax evaluate suite --checkpoint RUN --config FILE --output OUT.json`; RUN is a workdir.
"""

import dataclasses
from typing import Any

import numpy as np

from examples.captioner.writer import Writer
from grain_jax.core import boxes as boxes_lib
from grain_jax.core import images
from grain_jax.evaluate import evaluators


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(evaluators.AnnotatedImages):
    """IoU and Acc@0.5 of the box of each described region, and the share of the right parts in captions."""

    most: int = 200  # images, the first ones of the file

    def evaluate(self, predictor) -> dict[str, Any]:
        """Writes for each image.

        Returns:
          `phrase_iou`, `phrase_acc50`: how the box of a description fits its region. `chance_*`: the same
          with the box of that description in the next image. `parts_named`: descriptions of the file that a
          caption has, for each image; `parts_right`: the share of them that the image has.
        """
        writer = Writer(predictor)
        annotated = self.read()
        records, paths = annotated.records[: self.most], annotated.paths[: self.most]
        pictures = [images.decode_image(path.read_bytes(), str(path)) for path in paths]
        tokens = writer.image_tokens(pictures)
        asked = [(i, region) for i, record in enumerate(records) for region in record.regions]
        phrases = [region.description for _, region in asked]
        which = np.array([i for i, _ in asked])
        sides = np.array([pictures[i].size * 2 for i in which])
        true = np.array([region.box_xyxy for _, region in asked]) / sides
        result: dict[str, Any] = {"images": len(records), "phrases": len(phrases)}
        for name, image in (("", which), ("chance_", (which + 1) % len(records))):
            overlap = np.asarray(boxes_lib.iou_and_union(writer.boxes(tokens[image], phrases), true)[0])
            result |= {f"{name}phrase_iou": float(overlap.mean())}
            result |= {f"{name}phrase_acc50": float((overlap >= 0.5).mean())}
        every = set(phrases)
        named = right = 0
        for caption, record in zip(writer.captions(tokens), records, strict=True):
            described = {region.description for region in record.regions}
            parts = {phrase for phrase in every if phrase in caption}
            named, right = named + len(parts), right + len(parts & described)
        return result | {"parts_named": named / len(records), "parts_right": right / max(named, 1)}
