"""What a text decoder writes of images and of given boxes, against what annotators wrote.

Two evaluators: `captions` (CIDEr-D, exact captions, descriptions that they hold) and `descriptions` (exact
descriptions, and their cosines by the model's own text tower). Both say, too, how likely the model finds the
annotators' texts, per token. Chance, of each number, is that of an annotator's text of another image.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow, option
from grain_jax.core import errors
from grain_jax.evaluate.evaluators import Annotated, AnnotatedImages

with epy.lazy_imports():
    import numpy as np
    from etils import epath

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.core import atomic
    from grain_jax.evaluate import cider, encode, grounding, likelihood, rates
    from grain_jax.inference import inputs, prompts, scores, stream
    from grain_jax.runtime import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfTextDecoder(AnnotatedImages):
    """Base of the evaluators of what a text decoder writes."""

    writes_predictions = True
    # sequences that the search keeps; 1 is greedy
    beams: int = option(1, "N", low=1)

    @property
    def needs_text_decoder(self) -> bool:
        return True

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Writes and compares; with `context.predictions` the first process writes there a line of JSON an image.

        Returns: counts, and the numbers of `measured`.
        """
        inputs.need_text_decoder(predictor, self.kind)
        annotated = self.read()
        unreadable: dict[str, str] = {}
        here: list[dict[str, Any]] = []  # texts and numbers, not images

        def consume(batch: encode.Encoded) -> None:
            here.extend(self.lines(predictor, annotated, batch))

        for _ in encode.encode_images(
            predictor,
            annotated.images,
            label=self.kind,
            unreadable=unreadable,
            embed=False,
            consume=consume,
            batch_size=context.batch_size,
        ):
            pass
        lines = [line for part in processes.allgather_values(here) for line in part]
        if context.predictions is not None and processes.process_info()[0] == 0:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            atomic.write_text(epath.Path(context.predictions), text)
        counts = self.counts(annotated, len(lines), unreadable)
        measured = self.measured(predictor, lines)
        if len(annotated.records) == 1:  # there is no other image
            measured = {k: x for k, x in measured.items() if not k.startswith("chance_")}
        return {**counts, "beams": self.beams, **measured}

    @abc.abstractmethod
    def lines(
        self, predictor: Any, annotated: Annotated, batch: encode.Encoded
    ) -> Iterator[dict[str, Any]]:
        """What the model writes of each image of a batch, JSON-ready."""

    @abc.abstractmethod
    def measured(self, predictor: Any, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The numbers of all lines."""


def others_of(count: int) -> np.ndarray:
    """For each of so many images another one, whose texts give its chance: one cycle, drawn with a seed; int [count]."""
    order = np.random.default_rng(_SEED).permutation(count)
    others = np.empty(count, int)
    others[order] = np.roll(order, -1)
    return others


_SEED = 0  # of the other images
_PICTURES = "pictures", "pictures"
_CAPTIONS = "captions", "captions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions(OfTextDecoder):
    """Captions that the text decoder writes: CIDEr-D, exact captions, the parts that they name."""

    left_out = "without_caption"
    none_usable = "no line has a caption; expected captions to compare with"
    table = (
        TableRow("caption_cider", "CIDEr-D of captions", "chance_caption_cider", *_PICTURES, False),
        TableRow("caption_exact", "exact captions", "chance_caption_exact", *_PICTURES),
        TableRow(
            "caption_parts",
            "descriptions that the caption holds",
            "chance_caption_parts",
            "caption_descriptions",
            "descriptions",
        ),
        TableRow(
            "caption_perplexity",
            "perplexity of captions",
            "chance_caption_perplexity",
            *_CAPTIONS,
            False,
        ),
    )
    kind: str = "captions"

    def usable(self, record: annotations_lib.Annotation) -> Any:
        return captions_of(record)

    def lines(
        self, predictor: Any, annotated: Annotated, batch: encode.Encoded
    ) -> Iterator[dict[str, Any]]:
        records = annotated.records
        own = [captions_of(records[i]) for i in batch.index]
        other_of = others_of(len(records))
        others = [captions_of(records[other_of[i]])[0] for i in batch.index]
        tokens = predictor.encode_tokens(batch.pixels)
        written = predictor.caption(tokens, beams=self.beams)
        candidates = [[*texts, other] for texts, other in zip(own, others)]
        likely = predictor.caption_log_likelihood(tokens, candidates)
        stream.check_finite(*likely)
        for i, said, texts, other, log_p in zip(batch.index, written, own, others, likely):
            yield {
                "picture": records[i].image,
                "caption": said.text,
                "log_probability": float(said.log_probability),
                "references": list(texts),
                "references_log_p": log_p[:-1].tolist(),
                "other": other,
                "other_log_p": float(log_p[-1]),
                "descriptions": [region.description for region in records[i].regions],
            }

    def measured(self, predictor: Any, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Compares the captions.

        Words are in lower case, without punctuation (`cider.words`).

        Returns: `captions`, the references; `caption_cider`, the mean; `caption_words`, words of a caption, and
          `reference_caption_words`, of the first reference, on average; `caption_exact`, the share of the captions that
          have the words of a reference; `caption_descriptions`, the distinct ones of each image's regions;
          `caption_parts`, the share of them that the caption holds word for word, and `reference_caption_parts`, the same
          of the first reference; `caption_nll`, of a token of the references, in nats, and `caption_perplexity`. Shares
          have 95% intervals (`_low`, `_high`); each has a `chance_`.
        """
        references = [[cider.words(text) for text in line["references"]] for line in lines]
        described = [
            list(dict.fromkeys(tuple(cider.words(text)) for text in line["descriptions"]))
            for line in lines
        ]
        said = {
            "": [cider.words(line["caption"]) for line in lines],
            "chance_": [cider.words(line["other"]) for line in lines],
            "reference_": [own[0] for own in references],
        }
        held = {
            prefix: np.array(
                [cider.holds(text, part) for text, own in zip(texts, described) for part in own],
                bool,
            )
            for prefix, texts in said.items()
        }
        exact = {
            prefix: np.array([text in own for text, own in zip(said[prefix], references)], bool)
            for prefix in ("", "chance_")
        }
        scorer = cider.Scorer(references)
        texts = [text for line in lines for text in line["references"]]
        others = [line["other"] for line in lines]
        out = {
            "captions": len(texts),
            "caption_cider": float(scorer(said[""]).mean()),
            "chance_caption_cider": float(scorer(said["chance_"]).mean()),
            "caption_words": float(np.mean([len(text) for text in said[""]])),
            "reference_caption_words": float(np.mean([len(text) for text in said["reference_"]])),
            **rates.rate("caption_exact", exact[""]),
            "chance_caption_exact": float(exact["chance_"].mean()),
            "caption_descriptions": len(held[""]),
        }
        if len(held[""]):
            out |= rates.rate("caption_parts", held[""])
            out["chance_caption_parts"] = float(held["chance_"].mean())
            out["reference_caption_parts"] = float(held["reference_"].mean())
        log_p = [x for line in lines for x in line["references_log_p"]]
        others_log_p = [line["other_log_p"] for line in lines]
        return out | _likely(predictor, "caption", texts, log_p, others, others_log_p)


_BOXES = "boxes", "boxes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descriptions(OfTextDecoder):
    """Descriptions of given boxes that the text decoder writes: exact ones, cosines, perplexity."""

    table = (
        TableRow("description_exact", "exact descriptions", "chance_description_exact", *_BOXES),
        TableRow(
            "description_cosine",
            "cosine of descriptions",
            "chance_description_cosine",
            *_BOXES,
            False,
        ),
        TableRow(
            "description_perplexity",
            "perplexity of descriptions",
            "chance_description_perplexity",
            "descriptions",
            "descriptions",
            False,
        ),
    )
    kind: str = "descriptions"

    def lines(
        self, predictor: Any, annotated: Annotated, batch: encode.Encoded
    ) -> Iterator[dict[str, Any]]:
        records = annotated.records
        found = [
            grounding.described_boxes([records[i]], [size])
            for i, size in zip(batch.index, batch.sizes)
        ]
        boxes, places = zip(*map(_distinct_boxes, found)) if found else ((), ())
        other_of = others_of(len(records))
        candidates = []  # of each box its descriptions, and one of another image
        for i, of_boxes in zip(batch.index, places):
            own, others = records[i].regions, records[other_of[i]].regions
            candidates.append(
                [
                    [
                        *(own[place].description for place in several),
                        others[j % len(others)].description,
                    ]
                    for j, several in enumerate(of_boxes)
                ]
            )
        tokens = predictor.encode_tokens(batch.pixels)
        written = predictor.describe(tokens, boxes, beams=self.beams)
        likely = predictor.description_log_likelihood(tokens, boxes, candidates)
        stream.check_finite(*(log_p for own in likely for log_p in own))
        for row, (i, each) in enumerate(zip(batch.index, found)):
            regions = [
                {
                    "box": list(records[i].regions[several[0]].box_xyxy),
                    "description": said.text,
                    "log_probability": float(said.log_probability),
                    "references": texts,
                    "references_log_p": log_p[:-1].tolist(),
                    "other": other,
                    "other_log_p": float(log_p[-1]),
                }
                for several, said, (*texts, other), log_p in zip(
                    places[row], written[row], candidates[row], likely[row], strict=True
                )
            ]
            yield {"picture": records[i].image, "regions": regions, "outside": each.outside}

    def measured(self, predictor: Any, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Compares the descriptions of the boxes that lie in their images.

        Regions with one box are one box with several descriptions: RefCOCO has one of each annotator.

        Returns: `boxes`, distinct ones, `boxes_outside`, and `descriptions`, how many annotators gave;
          `description_exact`, the share of the boxes with the words of one of them (`cider.words`), with a 95% interval
          (`_low`, `_high`); `description_cosine`, the mean over boxes of the mean cosine with theirs by the model's text
          tower; `description_nll`, of a token of theirs, in nats, and `description_perplexity`. Each has a `chance_`.
        """
        regions = [region for line in lines for region in line["regions"]]
        if not regions:
            raise errors.UserError(f"{self.annotations}: every box lies outside its image")
        said, others = ([region[key] for region in regions] for key in ("description", "other"))
        references = [region["references"] for region in regions]
        texts = [text for own in references for text in own]
        counts = np.array(list(map(len, references)))
        distinct, at = prompts.distinct([*said, *others, *texts])
        embed = scores.unit(encode.encode_distinct(predictor, distinct))  # [T, D]
        of_said, of_others, of_texts = np.split(embed[at], [len(said), 2 * len(said)])

        def cosine(own: np.ndarray) -> float:
            each = (np.repeat(own, counts, axis=0) * of_texts).sum(axis=1)
            return float((np.add.reduceat(each, np.cumsum(counts) - counts) / counts).mean())

        words = [[cider.words(text) for text in own] for own in references]
        exact = lambda own: np.array([cider.words(x) in y for x, y in zip(own, words)], bool)
        return {
            "boxes": len(regions),
            "boxes_outside": sum(line["outside"] for line in lines),
            "descriptions": len(texts),
            **rates.rate("description_exact", exact(said)),
            "chance_description_exact": float(exact(others).mean()),
            "description_cosine": cosine(of_said),
            "chance_description_cosine": cosine(of_others),
            **_likely(
                predictor,
                "description",
                texts,
                [x for region in regions for x in region["references_log_p"]],
                others,
                [region["other_log_p"] for region in regions],
            ),
        }


def _distinct_boxes(described: grounding.Described) -> tuple[np.ndarray, list[list[int]]]:
    """The boxes of an image, float32 [n, 4] in [0, 1], and for each its places among the regions of the record."""
    places: dict[tuple[float, ...], list[int]] = {}
    for box, place in zip(described.boxes_xyxy.tolist(), described.region.tolist()):
        places.setdefault(tuple(box), []).append(place)
    return np.array(list(places), np.float32).reshape(-1, 4), list(places.values())


def captions_of(record: annotations_lib.Annotation) -> tuple[str, ...]:
    """The captions of annotators; where there is none, the synthetic one; () where there is neither."""
    return record.captions or tuple(filter(None, (record.synthetic_caption,)))


_TASKS = {"caption": "caption", "description": "describe"}


def _likely(
    predictor: Any,
    what: str,
    texts: Sequence[str],
    log_p: Sequence[float],
    others: Sequence[str],
    others_log_p: Sequence[float],
) -> dict[str, float]:
    """The likelihood per token of texts, and as chance that of texts of other images."""
    counts = likelihood.token_counts(predictor, [*texts, *others], _TASKS[what])
    own, of_others = np.split(counts, [len(texts)])
    return likelihood.per_token(what, np.array(log_p), own) | likelihood.per_token(
        f"chance_{what}", np.array(others_log_p), of_others
    )
