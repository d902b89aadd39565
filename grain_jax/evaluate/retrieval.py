"""Retrieval between images and captions, in both directions: R@1, R@5, R@10 (Flickr30k, MS-COCO, or any A.jsonl).

Every caption of an image is a query. The candidate texts are the distinct captions; if several images have the same
caption, each of them is a right answer to it. With `rerank` the first candidates are ordered by the likelihood of the
caption, too, and the rates stand beside those without (inference/rerank.py).
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow, option
from grain_jax.core import errors
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np
    from etils import epath

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.evaluate import encode, rates, second_pass, test_sets
    from grain_jax.inference import inputs, prompts, rerank, scores
    from grain_jax.runtime import pretrained, processes

KS = (1, 5, 10)
_MEASURE = "mean of R@1 of both directions"
_WAYS = (
    ("image_to_text", "image to text", "pictures"),
    ("text_to_image", "text to image", "captions"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(AnnotatedImages):
    """R@1, R@5, R@10 between images and captions, both ways."""

    left_out = "without_caption"
    none_usable = "no line has a caption; expected captions to retrieve"
    kind: str = "retrieval"
    # candidates that the text decoder orders by their likelihood, too; 0: none
    rerank: int = option(0, "K", low=0)
    # of the likelihood, in nats, beside the scaled cosine; default: the one that is stored with the model
    rerank_weight: float | None = option(None, "W", low=0)
    # tries weights on these images, which are validation data, and stores the best one with the model
    choose_weight: bool = option(False)

    @classmethod
    def of_flags(cls, **given: Any) -> typing.Self:
        entry = cls(**given)
        for line in entry.faults():
            raise errors.UserError(f"--{line.replace('_', '-')}")
        return entry

    @classmethod
    def rows(cls, numbers: Any) -> list[TableRow]:
        found = []
        for way, label, unit in _WAYS:
            for k in KS:
                chance = f"{way}/chance_r{k}"
                row = TableRow(f"{way}/r{k}", f"{label} R@{k}", chance, unit, unit)
                again = row._replace(key=f"reranked/{row.key}", label=f"{row.label}, reranked")
                found += [row, again]
        tried = [key.split("/")[1] for key in numbers if key.startswith("weights/")]
        for name in dict.fromkeys(tried):
            said = f"R@1, mean of both, at weight {name}"
            found.append(TableRow(f"weights/{name}/r1", said, None, "pictures", "pictures"))
        return found

    def faults(self) -> list[str]:
        weight = self.rerank_weight
        name = "choose_weight" if self.choose_weight else "rerank_weight"
        if weight is not None and self.choose_weight:
            return [f"rerank_weight: got {weight:g} with choose_weight, expected one of the two"]
        if not self.rerank and (weight is not None or self.choose_weight):
            return [f"rerank: got 0 with {name}, expected how many are reordered, such as 10"]
        return []

    def misses(self, model: Any) -> list[str]:
        del model
        if self.choose_weight:
            return [
                "choose_weight: got True in a run, expected it of a trained model: grain-jax evaluate retrieval"
                " --rerank 10 --choose-weight"
            ]
        if self.rerank and self.rerank_weight is None:
            return [
                "rerank_weight: got None in a run, which has no stored weight, expected a number, such as 0.25"
            ]
        return []

    def not_in_a_suite(self) -> list[str]:
        if self.choose_weight:
            return [
                "choose_weight: got True in a suite, expected it of one set of validation data: grain-jax evaluate"
                " retrieval --rerank 10 --choose-weight"
            ]
        return []

    @property
    def needs_text_decoder(self) -> bool:
        return self.rerank > 0

    def still_holds(self, result: Mapping[str, Any], predictor: Any) -> bool:
        if not self.rerank or self.rerank_weight is not None:
            return True

        def holds() -> bool:
            try:  # the weight may have been chosen again
                return rerank.weight_of(predictor, None)[0] == result.get("rerank_weight")
            except errors.UserError:
                return False

        return processes.of_first(holds)

    def usable(self, record: annotations_lib.Annotation) -> Any:
        return record.captions or record.synthetic_caption

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Ranks all distinct captions for each image, and all images for each caption.

        An image without a web caption has its synthetic one instead, and one without either is left out; both are
        counted. Two captions are equal where they are equal after the tokenizer's cleaning and lower-casing.

        Returns: counts; `image_to_text` and `text_to_image`, each with `r1`, `r5`, `r10` (a right answer among
          the first k; 95% intervals `_low`, `_high`) and `chance_r1`... (of a random order). Ties count as if
          broken at random. With `rerank` also `rerank_weight`, `rerank_from` (where it is from) and `reranked`, with
          the two directions; with `choose_weight` `weights`, of each weight the mean of the two R@1, `r1`.

        Raises:
          errors.UserError: with `rerank` also: the model has no text decoder, or no weight.
        """
        weight, source = self._weight(predictor)
        found = self.read()
        kept, seen, counts = self.gather(predictor, context, regions=False)
        image_embed = scores.unit(seen.image_embed)  # [N, D]
        captions = [record.captions or (record.synthetic_caption,) for record in kept]
        owner = np.repeat(np.arange(len(kept)), list(map(len, captions)))
        every: list[str] = [text for own in captions for text in own]
        texts, text_of = prompts.distinct(every, encode.as_read)
        text_embed = scores.unit(encode.encode_distinct(predictor, texts))  # [M, D]
        right = np.zeros((len(kept), len(texts)), bool)
        right[owner, text_of] = True
        ways = {
            "image_to_text": _Way(image_embed, text_embed, right, np.arange(len(kept))),
            "text_to_image": _Way(text_embed, image_embed, right.T, text_of),
        }
        out = {
            **counts,
            "captions": len(owner),
            "distinct_captions": len(texts),
            "synthetic_captions": sum(not r.captions for r in kept),
            **{name: way.recalls() for name, way in ways.items()},
        }
        if self.rerank:
            images = [found.images[i] for i in seen.index]
            again = self._reranking(predictor, images, texts, ways, context)
            if self.choose_weight:
                out["weights"] = again.tried()
                weight, source = self._choose(predictor, out)
            out["rerank_weight"], out["rerank_from"] = weight, source
            out["reranked"] = {"candidates": self.rerank, **again.recalls(weight)}
            if processes.process_info()[0] == 0:
                print(f"{self.kind}: reranked {self.rerank} by {source}", file=sys.stderr)
        return out

    def _weight(self, predictor: Any) -> tuple[float, str]:
        """The weight and where it is from, before anything is computed; on the first process's word."""
        if not self.rerank:
            return 0.0, ""
        inputs.need_text_decoder(predictor, "rerank")
        if not self.choose_weight:
            given, annotations = self.rerank_weight, self.paths[1]
            found: Any = processes.of_first(lambda: rerank.weight_of(predictor, given, annotations))
            return found[0], found[1]
        if getattr(predictor, "folder", None) is None:
            raise errors.UserError(
                "choose_weight: the model lies in no folder, expected one to store the weight in"
            )
        return 0.0, ""

    def _reranking(
        self,
        predictor: Any,
        images: Sequence[test_sets.Image],
        texts: list[str],
        ways: dict[str, _Way],
        context: Context,
    ) -> _Reranking:
        """The likelihoods of the candidates; every pair of an image and a caption is asked once."""
        both = ways["image_to_text"].queries, ways["text_to_image"].queries
        stage = rerank.first_stage(*both, self.rerank)

        def of(index: np.ndarray, tokens: Any) -> dict[str, np.ndarray]:
            asked = [[texts[t] for t in stage.texts_of(i).tolist()] for i in index]
            ask = lambda _, *given: predictor.caption_log_likelihood(*given)
            found = rerank.log_likelihoods(ask, tokens, asked)
            return {"found": np.concatenate(found)}

        found = second_pass.gather(
            predictor, images, of, label=f"{self.kind}, again", batch_size=context.batch_size
        )["found"]
        parts = rerank.parts(stage, found, *both)
        return _Reranking(ways, (stage.texts, stage.images), parts, float(predictor.logit_scale))

    def _choose(self, predictor: Any, out: dict[str, Any]) -> tuple[float, str]:
        """The weight with the best `weights`, the smallest of equal ones, once it is stored."""
        tried = {float(name): one["r1"] for name, one in out["weights"].items()}
        best = max(tried, key=lambda weight: (round(tried[weight], 9), -weight))
        if best == max(tried) and processes.process_info()[0] == 0:
            line = f"choose_weight: {best:g}, the largest that was tried, is best; a larger one may be better"
            print(f"{self.kind}: {line}: --rerank-weight", file=sys.stderr)
        if pretrained.is_of_name(predictor.folder):
            return best, (
                f"weight {best:g}, chosen now{rerank.SAME}; it is not stored with {predictor.folder}, which a name"
                f" stands for: give --rerank-weight {best:g}"
            )
        path = epath.Path(self.paths[1]).resolve()
        chosen = rerank.Chosen(
            weight=best,
            prior=rerank.PRIOR,
            top=self.rerank,
            model=predictor.digest,
            annotations=str(path),
            annotations_digest=rerank.digest_of(path),
            pictures=out["pictures"],
            captions=out["captions"],
            measure=_MEASURE,
            value=tried[best],
            without=tried[0.0],
            checkpoint=str(predictor.folder),
        )
        processes.of_first(lambda: str(rerank.write(predictor.folder, chosen)))
        return best, chosen.said(predictor.folder) + rerank.SAME


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """Candidates that come first, whatever their cosines, and their scores."""

    at: np.ndarray  # int [Q, k]
    scores: np.ndarray  # float64 [Q, k], of the scale of cosines


@dataclasses.dataclass(frozen=True)
class _Way:
    """A direction of retrieval."""

    queries: np.ndarray  # [Q, D], of unit length
    candidates: np.ndarray  # [C, D]
    right: np.ndarray  # bool [Q, C]
    rows: np.ndarray  # of the queries that are averaged, int, with repetitions

    def recalls(self, ahead: _Candidates | None = None) -> dict[str, float]:
        """R@k, with intervals and chance."""
        out = {}
        for k, hits in zip(KS, self.hits(KS, ahead)):
            chance = rates.chance_of_topk(self.right, k)[self.rows]
            out |= {**rates.rate(f"r{k}", hits), f"chance_r{k}": float(chance.mean())}
        return out

    def hits(self, ks: Sequence[int], ahead: _Candidates | None = None) -> list[np.ndarray]:
        """`rates.topk_hits` for each of `ks`, of the rows."""
        if ahead is None:
            found = rates.nearest_hits(self.queries, self.candidates, self.right, ks)
        elif ahead.at.shape[1] >= min(len(self.candidates), max(ks)):  # no other one counts
            right = np.take_along_axis(self.right, ahead.at, axis=1)
            found = [rates.topk_hits(ahead.scores, right, k) for k in ks]
        else:
            given = self.queries, self.right, ahead.at, ahead.scores
            found = scores.in_parts(_reordered(self.candidates, ks), *given)
        return [hits[self.rows] for hits in found]


def _reordered(candidates: np.ndarray, ks: Sequence[int]) -> Any:
    """(queries, right, candidates that come first, their scores) -> `rates.topk_hits` for each of `ks`."""

    def hits(part: np.ndarray, right: np.ndarray, at: np.ndarray, found: np.ndarray) -> list:
        similarity = (part @ candidates.T).astype(np.float64)
        above = found - found.min(axis=1, keepdims=True) + 3  # than any cosine
        np.put_along_axis(similarity, at, above, axis=1)
        return [rates.topk_hits(similarity, right, k) for k in ks]

    return hits


@dataclasses.dataclass(frozen=True)
class _Reranking:
    """The second stage of both directions, for any weight."""

    ways: dict[str, _Way]
    at: tuple[np.ndarray, np.ndarray]  # int [Q, k], the candidates of each direction
    parts: tuple[rerank.Parts, rerank.Parts]
    scale: float

    def recalls(self, weight: float) -> dict[str, Any]:
        """The rates of both directions."""
        found = self._candidates(weight)
        return {name: way.recalls(one) for (name, way), one in zip(self.ways.items(), found)}

    def tried(self) -> dict[str, dict[str, float]]:
        """For each weight of `rerank.WEIGHTS` the mean of the two R@1, and these."""
        out = {}
        for weight in rerank.WEIGHTS:
            found = zip(self.ways.items(), self._candidates(weight))
            r1 = {name: float(way.hits((1,), one)[0].mean()) for (name, way), one in found}
            out[f"{weight:g}"] = {"r1": sum(r1.values()) / len(r1), **r1}
        return out

    def _candidates(self, weight: float) -> list[_Candidates]:
        # As cosines, so that scores of both stages tie alike.
        several = (part.scores(1.0, weight / self.scale) for part in self.parts)
        return [_Candidates(at, one) for at, one in zip(self.at, several)]
