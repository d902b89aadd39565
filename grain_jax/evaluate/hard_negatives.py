"""Is the right description of a box nearer to it than its hard negatives?

The protocol of FG-OVD (Bianchi et al., CVPR 2024, "The Devil is in the Fine-Grained Details") for boxes that are given:
each box is compared with its description and its first N negatives; boxes with fewer are left out. The rank of the
description is 1 + the number of negatives whose score is at least its own (but for `rates.TIE`), as in
lorebianchi98/FG-OVD, evaluation/ranks.py. There detectors find the boxes, and one that was not found has the last rank.

A model with a text decoder is asked, too, how likely each text is: log p(description | box). Of whole captions, those
are compared in which a negative stands for the description, by the image and by log p(caption | image).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow, option
from grain_jax.core import errors
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.evaluate import box_classes, encode, grounding, likelihood, rates
    from grain_jax.inference import prompts, scores, stream
    from grain_jax.runtime import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardNegatives(AnnotatedImages):
    """The right description of given boxes among hard negatives."""

    left_out = "without_negatives"
    none_usable = (
        "no region has {negatives} negatives or more; expected regions with `negatives`, which grain-jax"
        " annotate --passes negatives makes; or ask for fewer"
    )
    lower_is_better = ("mean_rank", "median_rank")
    kind: str = "hard_negatives"
    # negatives of a box, 10 as in FG-OVD; boxes with fewer are left out
    negatives: int = option(10, "N", low=1)

    # the text decoder, of a model that has one, says how likely each text is, too
    text_decoder: bool = option(True)
    # captions are compared, too, in which each negative stands for the description
    captions: bool = option(False)

    @classmethod
    def rows(cls, numbers: Mapping[str, float]) -> Sequence[TableRow]:
        if "chance_mean_rank" not in numbers:  # of given boxes by their classes
            return []
        words = {"box_head": "box head", "region": "region", "image": "image"}
        words |= {"likelihood": "likelihood"}
        return [
            TableRow(
                f"{start}{key}/top1", f"right {what}, by the {by}", "chance", f"{start}boxes", unit
            )
            for start, what, unit in (
                ("", "description", "boxes"),
                ("captions/", "caption", "captions"),
            )
            for key, by in words.items()
        ]

    def usable(self, record: annotations_lib.Annotation) -> bool:
        return any(len(region.negatives) >= self.negatives for region in record.regions)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Compares every annotated box with its description and its negatives.

        Returns: counts; `chance` (of top-1), `chance_mean_rank`; under `box_head` (by the embedding of the box), `region`
          (by that of the query that overlaps the box most), `image` (by the image embedding) and `likelihood` (by
          log p(description | box)), as the model has them: `top1`, the share of boxes whose description is the best of the
          N + 1 texts, with a 95% interval (`_low`, `_high`; ties count as if broken at random), `mean_rank` and
          `median_rank` (1 is best; ties count as lost). With `captions`, under `captions` the same of captions that hold the
          description: `boxes`, how many; `image`; and `likelihood`, by log p(caption | image).
        """
        asks = self.text_decoder and getattr(predictor, "has_text_decoder", False)
        parts: list[_LogP] = []

        def consume(records: list[Any], batch: encode.Encoded) -> None:
            parts.append(self._log_p(predictor, records, batch))

        seen = box_classes.encode_boxes(self, predictor, context, consume if asks else None)
        pairs = zip(seen.described.image, seen.described.region)
        asked = [
            self._asked(seen.records[image], seen.records[image].regions[region])
            for image, region in pairs
        ]
        boxes = np.array([bool(each.descriptions) for each in asked], bool)
        if not boxes.any():
            raise errors.UserError(
                f"{self.annotations}: no box with {self.negatives} negatives or more lies in its image"
            )
        likely = processes.allgather([x.boxes for x in parts]) if asks else {}
        measured = self._measured(predictor, [x.descriptions for x in asked], seen.embeds, likely)
        out = {
            **seen.counts,
            "boxes": int(boxes.sum()),
            "boxes_outside": seen.described.outside,
            "boxes_with_fewer_negatives": int((~boxes).sum()),
            "negatives": self.negatives,
            "chance": 1 / (1 + self.negatives),
            "chance_mean_rank": 1 + self.negatives / 2,
            **measured,
        }
        captions = [each.captions for each in asked]
        if any(captions):
            likely = processes.allgather([x.captions for x in parts]) if asks else {}
            of_image = {"image": seen.embeds["image"]}
            measured = self._measured(predictor, captions, of_image, likely)
            out["captions"] = {"boxes": sum(map(bool, captions)), **measured}
        return out

    def _measured(
        self,
        predictor: Any,
        asked: Sequence[Sequence[str]],
        embeds: Mapping[str, np.ndarray],
        likely: Mapping[str, np.ndarray],
    ) -> dict[str, dict[str, float]]:
        """The results of the boxes with texts, by embeddings [M, D] of all boxes and by `log_p` [boxes with texts, 1 + N]."""
        use = np.array([bool(each) for each in asked], bool)
        distinct, at = prompts.distinct([text for each in asked for text in each])
        embed = scores.unit(encode.encode_distinct(predictor, distinct))  # [T, D]
        texts = at.reshape(-1, 1 + self.negatives)  # [boxes with texts, 1 + N]
        out = {}
        for key, box_embed in embeds.items():
            boxes = scores.unit(box_embed[use])
            cosines = np.stack([embed[own] @ box for own, box in zip(texts, boxes)])
            out[key] = likelihood.ranked(cosines, rates.TIE)
        if likely:
            out["likelihood"] = likelihood.ranked(likely["log_p"], likelihood.TIE)
        return out

    def _asked(self, record: annotations_lib.Annotation, region: annotations_lib.Region) -> _Asked:
        """The texts of a box, the right one first."""
        negatives = region.negatives[: self.negatives]
        if len(negatives) < self.negatives:
            return _Asked((), ())
        captions = (*record.captions, record.synthetic_caption) if self.captions else ()
        spoken = r"\s+".join(map(re.escape, region.description.split()))
        pattern = re.compile(rf"(?<!\w){spoken}(?!\w)", re.IGNORECASE)
        said = next(filter(None, map(pattern.search, captions)), None)
        changed = ()
        if said is not None:
            start, end = said.string[: said.start()], said.string[said.end() :]
            changed = (said.string, *(start + text + end for text in negatives))
        return _Asked((region.description, *negatives), changed)

    def _log_p(self, predictor: Any, records: Sequence[Any], batch: encode.Encoded) -> _LogP:
        """How likely the texts of the boxes of a batch are."""
        found = [
            grounding.described_boxes([each], [size]) for each, size in zip(records, batch.sizes)
        ]
        asked = [
            [self._asked(record, record.regions[place]) for place in each.region]
            for record, each in zip(records, found)
        ]
        boxes = [
            each.boxes_xyxy[[bool(x.descriptions) for x in own]] for each, own in zip(found, asked)
        ]
        texts = [[x.descriptions for x in own if x.descriptions] for own in asked]
        tokens = predictor.encode_tokens(batch.pixels)
        of_boxes = predictor.description_log_likelihood(tokens, boxes, texts)
        captions = [[text for x in own for text in x.captions] for own in asked]
        of_captions = (
            predictor.caption_log_likelihood(tokens, captions) if any(captions) else captions
        )
        return _LogP(self._rows([row for own in of_boxes for row in own]), self._rows(of_captions))

    def _rows(self, log_p: Sequence[Any]) -> dict[str, np.ndarray]:
        """[boxes with texts, 1 + N]."""
        rows = np.array([x for own in log_p for x in own], np.float32)
        stream.check_finite(rows)
        return {"log_p": rows.reshape(-1, 1 + self.negatives)}


class _Asked(NamedTuple):
    """The texts that a box is compared with, 1 + N or none."""

    descriptions: tuple[str, ...]
    captions: tuple[str, ...]


class _LogP(NamedTuple):
    """Of a batch, each "log_p" -> float32 [boxes with texts, 1 + N], nats."""

    boxes: dict[str, np.ndarray]
    captions: dict[str, np.ndarray]
