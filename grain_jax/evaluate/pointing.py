"""Where a text decoder points for phrases: IoU and Acc@0.5, by the protocol of `grounding`, of any model with one.

Chance is the box that the model points at for a phrase of another image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.evaluators import Annotated
from grain_jax.evaluate.grounding import Grounding
from grain_jax.evaluate.written import OfTextDecoder

with epy.lazy_imports():
    import numpy as np

    from grain_jax.evaluate import encode, grounding, written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pointing(OfTextDecoder):
    """Boxes that the text decoder points at for phrases: IoU, Acc@0.5."""

    table = tuple(row for row in Grounding.table if row.key.startswith("phrase_"))
    kind: str = "pointing"

    def lines(
        self, predictor: Any, annotated: Annotated, batch: encode.Encoded
    ) -> Iterator[dict[str, Any]]:
        records = [annotated.records[i] for i in batch.index]
        found = [
            grounding.described_boxes([record], [size])
            for record, size in zip(records, batch.sizes)
        ]
        texts = [
            [record.regions[each.region[own[0]]].description for own in each.phrases]
            for record, each in zip(records, found)
        ]
        tokens = predictor.encode_tokens(batch.pixels)
        pointed = predictor.point(tokens, texts, beams=self.beams)
        for record, each, said, answers in zip(records, found, texts, pointed, strict=True):
            phrases = [
                {
                    "text": text,
                    "boxes": each.boxes_xyxy[list(own)].tolist(),
                    "pointed": answer.box_xyxy.tolist(),
                    "log_probability": float(answer.log_probability),
                }
                for text, own, answer in zip(said, each.phrases, answers, strict=True)
            ]
            yield {"picture": record.image, "phrases": phrases, "outside": each.outside}

    def measured(self, predictor: Any, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Compares the boxes.

        Returns: `regions_outside`, boxes that are left out; `phrases`, their number; `phrase_iou`, `phrase_acc50` and,
          where a phrase has several boxes, the rest as of `Grounding.evaluate`; each with a `chance_`, unless one image
          alone has phrases.
        """
        of_images = [line["phrases"] for line in lines if line["phrases"]]
        if not of_images:
            raise errors.UserError(
                f"{self.annotations}: no phrase has a box that lies in its image"
            )
        own = [phrase for phrases in of_images for phrase in phrases]
        others = [
            of_images[other][j % len(of_images[other])]
            for other, phrases in zip(written.others_of(len(of_images)), of_images)
            for j in range(len(phrases))
        ]
        counts = np.array([len(phrase["boxes"]) for phrase in own])
        true_boxes_xyxy = np.array([box for phrase in own for box in phrase["boxes"]], np.float32)

        def rates_of(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
            boxes_xyxy = np.array([[answer["pointed"]] for answer in answers], np.float32)
            share = np.ones((len(counts), 1))
            return grounding.phrase_rates(true_boxes_xyxy, counts, boxes_xyxy, share)

        found, by_chance = rates_of(own), rates_of(others)
        out: dict[str, Any] = {"regions_outside": sum(line["outside"] for line in lines)}
        for key, value in found.items():
            if not key.startswith("chance_"):
                out[key] = value
            elif len(of_images) > 1:
                out[key] = by_chance[key.removeprefix("chance_")]
        return out
