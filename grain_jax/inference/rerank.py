"""Retrieval in two stages: the first candidates by cosine are ordered by the likelihood of the text, too.

docs/method.md, Reranking, has the equations. The weight of the likelihood is chosen on validation images, and lies
beside the model (`Chosen`). N images and M texts; all is numpy.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from etils import epath

from grain_jax.core import atomic, regular_file
from grain_jax.inference import scores
from grain_jax.inference.inputs import InputError
from grain_jax.losses.contrastive import TIE

TOP = 10  # candidates of a query
SAMPLE = 32  # images that the prior of a text is the median over
WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)  # that are tried
FILE = "rerank.json"
CHOOSE = "grain-jax evaluate retrieval --rerank 10 --choose-weight with --images and --annotations of VALIDATION data"
_AT_ONCE = 1024  # texts that the decoder reads at a time
_EXPECTED = "the weight that --choose-weight wrote"


class Reranked(NamedTuple):
    """The candidates of images and of texts, the best first."""

    texts: np.ndarray  # int [N, k], positions of the texts of each image
    text_scores: np.ndarray  # float64 [N, k]
    images: np.ndarray  # int [M, k], positions of the images of each text
    image_scores: np.ndarray  # float64 [M, k], without the prior: of one text it is one number


class FirstStage(NamedTuple):
    """What the first stage leaves for the second one."""

    texts: np.ndarray  # int [N, k], the candidates of each image
    images: np.ndarray  # int [M, k], those of each text
    sample: np.ndarray  # int [S], the images of the prior, rising
    keys: np.ndarray  # int64 [P], rising: image * M + text of each pair that is scored, once

    def texts_of(self, image: int) -> np.ndarray:
        """The texts that are scored with an image, int, rising."""
        first, last = np.searchsorted(self.keys, [image * self._count, (image + 1) * self._count])
        return self.keys[first:last] % self._count

    @property
    def _count(self) -> int:
        return len(self.images)

    def at(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Where pairs lie among the P; arguments int of one shape."""
        return np.searchsorted(self.keys, image * self._count + text)


class Parts(NamedTuple):
    """The summands of the scores of candidates; the score is scale * cosine + weight * gain."""

    cosine: np.ndarray  # float64 [Q, k]
    gain: np.ndarray  # float64 [Q, k], log-likelihood less prior, in nats

    def scores(self, scale: float, weight: float) -> np.ndarray:
        """float64 [Q, k]."""
        return scale * self.cosine + weight * self.gain


def first_stage(image_embed: np.ndarray, text_embed: np.ndarray, top: int) -> FirstStage:
    """The first stage: the `top` nearest of each query, in both directions.

    Args:
      image_embed, text_embed: [N, D], [M, D], of unit length.
      top: 1 or more; of fewer candidates all.

    Raises:
      InputError: fewer than two images: there is no other image for the prior.
    """
    count, texts = len(image_embed), len(text_embed)
    if count < 2:
        raise InputError(
            f"rerank: got {count} image, expected 2 or more: the prior of a text is a median over other images"
        )
    texts_of = nearest(image_embed, text_embed, top)
    images_of = nearest(text_embed, image_embed, top)
    # The same images for every text, evenly spaced.
    sample = np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).round().astype(int))
    pairs = [
        np.arange(count)[:, None] * texts + texts_of,
        images_of * texts + np.arange(texts)[:, None],
        sample[:, None] * texts + np.unique(texts_of),
    ]
    return FirstStage(
        texts_of, images_of, sample, np.unique(np.concatenate([x.ravel() for x in pairs]))
    )


def nearest(queries: np.ndarray, candidates: np.ndarray, top: int) -> np.ndarray:
    """The positions of the `top` candidates with the largest dot products, rising, int [Q, min(top, C)].

    Of those that tie at the end (losses/contrastive.py, TIE) the first are taken.
    """
    top = min(top, len(candidates))

    def of(part: np.ndarray) -> tuple[np.ndarray]:
        similarity = part @ candidates.T
        last = np.partition(similarity, -top, axis=1)[:, -top, None]
        level = (similarity < last - TIE).astype(np.int8) - (similarity > last + TIE)
        return (np.sort(np.argsort(level, axis=1, kind="stable")[:, :top], axis=1),)

    return scores.in_parts(of, queries)[0] if top else np.zeros((len(queries), 0), int)


def parts(
    stage: FirstStage, log_likelihood: np.ndarray, image_embed: np.ndarray, text_embed: np.ndarray
) -> tuple[Parts, Parts]:
    """The summands of the candidate texts of images, [N, k], and of the candidate images of texts, [M, k].

    The prior of text t beside image i is the median of log p(t | j) over the images j of the sample other than i; a mean
    would be moved by the one j to which t belongs. Of one text it would be one number for all images, so the second
    result is without.

    Args:
      stage: of `first_stage`.
      log_likelihood: [P], log p(text | image) of its pairs, in nats.
      image_embed, text_embed: as for `first_stage`.
    """
    found = np.asarray(log_likelihood, np.float64)
    image, text = np.arange(len(stage.texts))[:, None], np.arange(len(stage.images))[:, None]
    own = found[stage.at(image, stage.texts)]  # [N, k]
    needed, which = np.unique(stage.texts, return_inverse=True)
    which = which.reshape(own.shape)
    of_sample = found[stage.at(stage.sample[:, None], needed)]  # [S, texts]
    prior = np.median(of_sample, axis=0)[which]
    for row, i in enumerate(stage.sample):
        prior[i] = np.median(np.delete(of_sample[:, which[i]], row, axis=0), axis=0)
    of = lambda queries, candidates, at: scores.in_parts(
        lambda q, i: (np.einsum("qd,qkd->qk", q, candidates[i], dtype=np.float64),), queries, at
    )[0]
    return (
        Parts(of(image_embed, text_embed, stage.texts), own - prior),
        Parts(of(text_embed, image_embed, stage.images), found[stage.at(stage.images, text)]),
    )


def ordered(stage: FirstStage, found: tuple[Parts, Parts], scale: float, weight: float) -> Reranked:
    """The candidates in the order of their scores; equal ones in that of their positions."""
    out = []
    for at, part in zip((stage.texts, stage.images), found):
        values = part.scores(scale, weight)
        order = np.argsort(-values, axis=1, kind="stable")
        out += [np.take_along_axis(x, order, axis=1) for x in (at, values)]
    return Reranked(*out)


def log_likelihoods(
    ask: Callable[[np.ndarray, Any, list[list[str]]], Sequence[np.ndarray]],
    tokens: Any,
    texts: Sequence[Sequence[str]],
    shape: tuple[int, ...] = (),
) -> list[np.ndarray]:
    """What `ask` says of the texts of each image, at most _AT_ONCE numbers at a time.

    Args:
      ask: (positions of some of the images, their tokens, a list of texts of each) -> for each an array [n, *shape].
      tokens: `Predictor.encode_tokens` of the images.
      texts: of each image any number.
      shape: of the numbers of a text.

    Returns: for each image float64 [n, *shape].

    Raises:
      InputError: a number is not finite.
    """
    found: list[list[np.ndarray]] = [[] for _ in texts]
    counts = np.array(list(map(len, texts)), int)
    first = 0
    while len(rows := np.flatnonzero(counts > first)):
        few = max(1, _AT_ONCE >> (len(rows) * math.prod(shape) - 1).bit_length())
        last = first + few
        some = [list(texts[i][first:last]) for i in rows.tolist()]
        for i, values in zip(rows, ask(rows, tokens.at(rows), some)):
            found[i].append(np.asarray(values, np.float64))
        first = last
    out = [np.concatenate([np.zeros((0, *shape)), *own]) for own in found]
    if not all(np.isfinite(own).all() for own in out):
        raise InputError("the text decoder gives likelihoods that are not finite")
    return out


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The weight of a model, as FILE has it: where and how it was chosen."""

    weight: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    prior: Annotated[str, msgspec.Meta(max_length=200)]
    top: Annotated[int, msgspec.Meta(ge=1)]
    model: Annotated[
        str, msgspec.Meta(max_length=64)
    ]  # Predictor.digest of the model that was measured
    annotations: Annotated[str, msgspec.Meta(max_length=4096)]  # of the validation set
    annotations_digest: Annotated[str, msgspec.Meta(max_length=64)]  # `digest_of` them
    pictures: Annotated[int, msgspec.Meta(ge=2)]
    captions: Annotated[int, msgspec.Meta(ge=1)]
    measure: Annotated[str, msgspec.Meta(max_length=200)]
    value: Annotated[float, msgspec.Meta(ge=0, le=1)]  # of the measure, with this weight
    without: Annotated[float, msgspec.Meta(ge=0, le=1)]  # with the weight 0
    checkpoint: Annotated[str, msgspec.Meta(max_length=4096)]  # that was measured

    def said(self, folder: epath.PathLike) -> str:
        """Which weight it is, and where it was chosen, for the model that lies in `folder`."""
        return (
            f"weight {self.weight:g} of {path_of(folder)}, chosen for the first {self.top} on"
            f" {self.annotations} ({self.pictures} images)"
        )


SAME = ", the annotations that are measured here: no test"  # at the end of `Chosen.said`
PRIOR = f"median log-likelihood over {SAMPLE} images"


def path_of(folder: epath.PathLike) -> epath.Path:
    """The file beside the model that was read from `folder`: of a checkpoint of a run, in the run's workdir."""
    folder = epath.Path(folder)
    is_of_run = folder.parent.name == "checkpoints" and folder.name.isdigit()
    return (folder.parent.parent if is_of_run else folder) / FILE


def digest_of(annotations: epath.PathLike) -> str:
    """SHA-256 of a file. Raises regular_file.FileError: it cannot be read."""
    digest = hashlib.sha256()
    with regular_file.opened(annotations, "annotations (A.jsonl)") as (file, _):
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(folder: epath.PathLike) -> Chosen | None:
    """The weight beside a model; None where there is none. Raises regular_file.FileError: it is damaged."""
    path = path_of(folder)
    if not path.exists():
        return None
    return regular_file.read_json(path, Chosen, _EXPECTED, 1 << 20)


def write(folder: epath.PathLike, chosen: Chosen) -> epath.Path:
    """Stores the weight beside the model, over another one. Raises InputError: it cannot be written."""
    path = path_of(folder)
    try:
        atomic.write_text(path, json.dumps(msgspec.to_builtins(chosen), indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; expected a folder of the model to write the weight to; give"
            f" --rerank-weight {chosen.weight:g} instead"
        ) from None
    return path


def weight_of(model: Any, given: float | None, measured: str = "") -> tuple[float, str]:
    """The weight, and where it is from: `given`, or the one beside the model.

    Args:
      model: a Predictor: its `folder`, if any, and its `digest`.
      given: the weight, or None.
      measured: the annotations that are measured with it, if any: a weight that was chosen on them says so.

    Raises:
      InputError: there is none, or it was chosen for another model; one line says how to choose it.
      regular_file.FileError: the stored one is damaged.
    """
    if given is not None:
        return given, f"weight {given:g}, as given"
    folder = getattr(model, "folder", None)
    chosen = None if folder is None else read(folder)
    if folder is None or chosen is None:
        where = "the model lies in no folder"
        if folder is not None:
            where = f"{path_of(folder)}: no such file"
        raise InputError(
            f"rerank: no weight is given, and {where}; give one (--rerank-weight, weight=), or choose it: {CHOOSE}"
        )
    if chosen.model != model.digest:
        raise InputError(
            f"{path_of(folder)}: got the weight of another model ({chosen.checkpoint}), expected one that was chosen"
            f" for this one; choose it again: {CHOOSE}; or give --rerank-weight {chosen.weight:g}"
        )
    is_same = measured and digest_of(measured) == chosen.annotations_digest
    return chosen.weight, chosen.said(folder) + (SAME if is_same else "")
