"""Where a text decoder points for phrases: IoU and Acc@0.5, by the protocol of `grounding`, of any model with one.

Chance is the box that the model points at for the same phrase in another image: what the phrase alone tells.
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
    """Boxes that the text decoder points at for phrases: IoU, Acc@0.5.

    Each image is asked its own phrases, and for chance the descriptions of one other image (`written.others_of`).
    """

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
        others = written.others_of(len(annotated.records))[batch.index]
        asked = [  # none where there is one image alone
            list(dict.fromkeys(x.description for x in annotated.records[j].regions if j != i))
            for i, j in zip(batch.index, others)
        ]
        tokens = predictor.encode_tokens(batch.pixels)
        both = [own + more for own, more in zip(texts, asked, strict=True)]
        pointed = predictor.point(tokens, both, beams=self.beams)
        for i, other, record, each, said, more, answers in zip(
            batch.index, others, records, found, texts, asked, pointed, strict=True
        ):
            phrases = [
                {
                    "text": text,
                    "boxes": each.boxes_xyxy[list(own)].tolist(),
                    "pointed": answer.box_xyxy.tolist(),
                    "log_probability": float(answer.log_probability),
                }
                for text, own, answer in zip(said, each.phrases, answers)
            ]
            boxes = [answer.box_xyxy.tolist() for answer in answers[len(said) :]]
            yield {
                "picture": record.image,
                "record": int(i),
                "phrases": phrases,
                "outside": each.outside,
                "other": {"record": int(other), "pointed": dict(zip(more, boxes, strict=True))},
            }

    def measured(self, predictor: Any, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Compares the boxes.

        Returns: `regions_outside`, boxes that are left out; `phrases`, their number; `phrase_iou`, `phrase_acc50` and,
          where a phrase has several boxes, the rest as of `Grounding.evaluate`; each with a `chance_`, of the phrases
          that another image was asked.
        """
        own = [(line["record"], phrase) for line in lines for phrase in line["phrases"]]
        if not own:
            raise errors.UserError(
                f"{self.annotations}: no phrase has a box that lies in its image"
            )
        elsewhere = {
            (line["other"]["record"], text): box
            for line in lines
            for text, box in line["other"]["pointed"].items()
        }
        answers = [(phrase, phrase["pointed"]) for _, phrase in own]
        by_chance = [
            (phrase, elsewhere[record, phrase["text"]])
            for record, phrase in own
            if (record, phrase["text"]) in elsewhere
        ]
        out: dict[str, Any] = {"regions_outside": sum(line["outside"] for line in lines)}
        found = _rates(answers)
        chance = _rates(by_chance) if by_chance else {}
        for key, value in found.items():
            if not key.startswith("chance_"):
                out[key] = value
            elif (rate := key.removeprefix("chance_")) in chance:
                out[key] = chance[rate]
        return out


def _rates(answers: Sequence[tuple[dict[str, Any], list[float]]]) -> dict[str, Any]:
    """`grounding.phrase_rates` of (phrase, the box that is the answer to it)."""
    counts = np.array([len(phrase["boxes"]) for phrase, _ in answers])
    true_boxes_xyxy = np.array(
        [box for phrase, _ in answers for box in phrase["boxes"]], np.float32
    )
    boxes_xyxy = np.array([[box] for _, box in answers], np.float32)
    return grounding.phrase_rates(true_boxes_xyxy, counts, boxes_xyxy, np.ones((len(counts), 1)))
