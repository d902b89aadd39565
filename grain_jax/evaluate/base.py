"""What every evaluation needs: pictures in batches, ties, chances and intervals; and `run` and `check`, which pick one.

An evaluation is a function `evaluate(predictor, *, ...)` that returns a JSON-ready dict. The predictor
is an `inference.Predictor` or anything with its `encode_image`, `encode_text` and `encode_regions`.
"""

import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import annotations as annotations_lib
from grain_jax import config as config_lib
from grain_jax import errors, images, schema

BATCH_SIZE = 64
# Kind of evaluation -> its module, which has `evaluate(predictor, *, ...)`; all but zeroshot also `read`.
_MODULES = {
    "zeroshot": "grain_jax.evaluate.zeroshot",
    "retrieval": "grain_jax.evaluate.retrieval",
    "grounding": "grain_jax.evaluate.grounding",
    "boxes": "grain_jax.evaluate.box_classes",
    "diagnostics": "grain_jax.evaluate.diagnostics",
}
_THREADS = 8  # that read pictures; decoding leaves Python's lock
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal
_NAMED_PICTURES = 20  # unreadable ones that a result lists
_Z = 1.959963984540054  # of the normal distribution, two sides, 95%


class InputError(errors.UserError):
    """What was given cannot be evaluated; the message has one line a fault."""


class Encoded(NamedTuple):
    """A batch of readable pictures and what the model sees in them."""

    index: np.ndarray  # int [B], positions in the list of paths
    sizes: list[tuple[int, int]]  # width, height in pixels
    image_embed: np.ndarray  # float32 [B, D]
    regions: schema.Regions | None


class Annotated(NamedTuple):
    """Annotations, and those of them that an evaluation can use."""

    read: annotations_lib.Annotations
    records: list[annotations_lib.Annotation]
    folder: epath.Path  # that the records' paths start from


def run(entry: config_lib.Evaluator, predictor: Any, **options: Any) -> dict[str, float]:
    """The numbers of one entry of `config.evals`, e.g. {"alpha_0.5/top1": 0.79, "chance": 0.025}.

    Raises:
      InputError: the entry lacks a field that its kind needs, or names files that cannot be used.
    """
    return scalars(evaluate(entry, predictor, **options))


def evaluate(entry: config_lib.Evaluator, predictor: Any, **options: Any) -> dict[str, Any]:
    """All that `run` measures, with counts and texts, as a JSON-ready dict; errors as there."""
    module = _module(entry)
    if entry.kind == "boxes":
        options |= dict(classes=entry.classes, templates=entry.templates)
    if entry.kind != "zeroshot":
        return module.evaluate(
            predictor, images=entry.images, annotations=entry.annotations, **options
        )
    return module.evaluate(
        predictor,
        images=entry.images,
        descriptions=entry.descriptions,
        alphas=_alphas(entry),
        names=entry.names,
        region_order=entry.region_order,
        **options,
    )


def check(entry: config_lib.Evaluator, *, templates: epath.PathLike | None = None) -> None:
    """Finds without a model whatever in the entry's files would end an evaluation.

    Faulty lines few enough to be left out, and unknown keys, are reported on stderr.

    Args:
      entry: an entry of `config.evals`.
      templates: zeroshot: file of prompts; default: the general set of the package.

    Raises:
      InputError: one line a fault, all of them; `__cause__` is the error if there was but one.
    """
    from grain_jax.evaluate import prompts, zeroshot

    module = _module(entry)
    found: list[Exception] = []

    def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (errors.UserError, OSError) as error:
            found.append(error)

    if entry.kind == "zeroshot":
        folders = attempt(zeroshot.class_folders, entry.images)
        if entry.descriptions is not None:
            classes = folders[0] if folders else ()
            attempt(zeroshot.read_descriptions, entry.descriptions, classes)
        attempt(zeroshot.check_alphas, _alphas(entry), entry.descriptions, entry.names)
        attempt(zeroshot.check_region_order, entry.region_order)
        if entry.names:
            attempt(prompts.load_templates, templates)
    else:
        attempt(picture_folder, entry.images)
        annotated = attempt(module.read, entry.images, entry.annotations)
        if annotated:
            _report_left_out(entry.annotations, annotated.read)
            attempt(_some_picture, entry.annotations, annotated)
    if found:
        lines = dict.fromkeys(line for error in found for line in str(error).split("\n"))
        raise InputError("\n".join(lines)) from (found[0] if len(found) == 1 else None)


def _module(entry: config_lib.Evaluator) -> Any:
    """The module that evaluates this kind. Raises InputError where the entry itself is wrong."""
    if entry.kind not in _MODULES:
        raise InputError(f"kind: got {entry.kind!r}, expected one of {', '.join(_MODULES)}")
    if entry.kind != "zeroshot" and entry.annotations is None:
        raise InputError(f"annotations: got nothing, expected a file (A.jsonl) for {entry.kind}")
    return importlib.import_module(_MODULES[entry.kind])  # only now: they import this module


def _alphas(entry: config_lib.Evaluator) -> Sequence[float]:
    """Without descriptions there is no region score, so 1 alone; alphas that are no shares stay, as faults."""
    if entry.descriptions is not None:
        return entry.alphas
    return [alpha for alpha in entry.alphas if not 0 <= alpha <= 1] or (1.0,)


def _report_left_out(path: epath.PathLike, read: annotations_lib.Annotations) -> None:
    lines = list(read.faults)
    if read.faults:  # few enough to go on without their lines
        lines.append(f"{path}: faulty lines left out: {read.faulty_lines}")
    if read.unknown_keys:
        named = ", ".join(f"{key} ({n})" for key, n in read.unknown_keys.items())
        lines.append(f"{path}: unknown keys kept out: {named}")
    if lines:
        print(*lines, sep="\n", file=sys.stderr)


def _some_picture(path: epath.PathLike, annotated: Annotated) -> None:
    """Raises InputError where not one picture is there, as below a wrong folder."""
    places = [annotated.folder / record.image for record in annotated.records]
    if not any(place.exists() for place in places):  # mostly ends at the first
        raise InputError(
            f"{annotated.folder}: none of the {len(places)} pictures of {path} is there; the first:"
            f" {places[0]}; expected the folder that the annotations' paths start from"
        )


def scalars(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a result, nested names joined by `/`; texts and lists are left out."""
    out = {}
    for key, value in result.items():
        if isinstance(value, Mapping) and key != "per_class":
            out |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[prefix + key] = float(value)
    return out


def encode_pictures(
    predictor: Any,
    paths: Sequence[epath.PathLike],
    *,
    label: str,
    unreadable: dict[str, str],
    regions: bool = True,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Encoded]:
    """Embeds pictures batch by batch; the next batch is read while the model works on this one.

    Args:
      predictor: encodes lists of PIL pictures.
      paths: the pictures.
      label: what the progress line calls them.
      unreadable: gets path -> reason for each picture that is left out.
      regions: whether region embeddings are wanted too.
      batch_size: pictures at a time.

    Raises:
      InputError: not a single picture could be read.
    """

    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    size = model.image.image_size if model else None

    def read(path: epath.PathLike) -> tuple[Any, tuple[int, int]] | str:
        try:
            picture = images.load_image(path)
        except images.ImageError as error:
            return str(error)
        # Squashed here, a batch takes little memory and the work is spread over the threads.
        return images.squash(picture, size) if size else images.to_rgb(picture), picture.size

    starts = range(0, len(paths), batch_size)
    progress = _Progress(label, len(paths))
    seen = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        submit = lambda start: [pool.submit(read, p) for p in paths[start : start + batch_size]]
        coming = submit(0)
        for start in starts:
            current, coming = coming, submit(start + batch_size)
            batch, sizes, index = [], [], []
            for position, future in enumerate(current, start):
                got = future.result()
                if isinstance(got, str):
                    unreadable[str(paths[position])] = got
                else:
                    batch.append(got[0])
                    sizes.append(got[1])
                    index.append(position)
            if batch:
                embed, found = _encode(predictor, batch, regions)
                seen += len(batch)
                yield Encoded(np.array(index), sizes, embed, found)
            progress.update(len(current))
    progress.close()
    if not seen:
        first = next(iter(unreadable.values()), "there are none")
        raise InputError(f"none of {len(paths)} pictures can be read; the first: {first}")


def _encode(predictor, batch, regions):
    """(image_embed, Regions or None), in one pass through the towers where the predictor offers it."""
    if not regions:
        embed, found = predictor.encode_image(batch), None
    elif hasattr(predictor, "encode_image_and_regions"):
        embed, found = predictor.encode_image_and_regions(batch)
    else:
        embed, found = predictor.encode_image(batch), predictor.encode_regions(batch)
    if not np.isfinite(embed).all() or (found and not all(np.isfinite(a).all() for a in found)):
        raise InputError("the model's embeddings are not finite: the checkpoint cannot be used")
    return embed, found


def read_annotations(
    images: epath.PathLike,
    annotations: epath.PathLike,
    usable: Callable[[annotations_lib.Annotation], Any],
    none_usable: str,
) -> Annotated:
    """The annotations that are `usable`.

    Raises:
      InputError: no such folder, or (with `none_usable`'s words) not one can be used.
      annotations.AnnotationError: the file cannot be used.
    """
    read = annotations_lib.read(annotations)
    folder = picture_folder(images)
    records = [record for record in read.records if usable(record)]
    if not records:
        raise InputError(f"{annotations}: {none_usable}")
    return Annotated(read, records, folder)


def picture_folder(path: epath.PathLike) -> epath.Path:
    """The folder that annotations' paths start from. Raises InputError if there is none."""
    path = epath.Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such folder; expected the one that the annotations' paths start from"
        )
    return path


def encode_texts(predictor: Any, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each list of texts its embeddings, float32 [n, D]; a text that stands in several is encoded once."""
    place = {text: i for i, text in enumerate(dict.fromkeys(t for group in texts for t in group))}
    embed = np.asarray(predictor.encode_text(list(place)))
    return [embed[[place[text] for text in group]] for group in texts]


def topk_hits(scores: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """The chance, for each row, that a right candidate is among the k best, ties being broken at random.

    So a model that gives every class the same score scores chance, whatever the order of the classes.

    Args:
      scores: [N, C].
      right: bool [N, C], at least one a row.
      k: 1 or more.

    Returns: float64 [N] in [0, 1]; 0 or 1 where no tie matters.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    above = (~right & (scores > best)).sum(axis=1)
    tied_wrong = (~right & (scores == best)).sum(axis=1)
    tied_right = (right & (scores == best)).sum(axis=1)
    return _drawn(tied_right, tied_wrong, np.minimum(k, scores.shape[1]) - above)


def chance_of_topk(right: np.ndarray, k: int) -> np.ndarray:
    """What `topk_hits` is for candidates in a random order; `right` bool [N, C] -> float64 [N]."""
    number = right.sum(axis=1)
    return _drawn(number, right.shape[1] - number, np.full(len(right), min(k, right.shape[1])))


def _drawn(right: np.ndarray, wrong: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The chance that `draws` draws without replacement hold a right one (hypergeometric), all int [N]."""
    miss = np.ones(len(right))
    for draw in range(max(0, draws.max(initial=0))):
        left = np.maximum(right + wrong - draw, 1)
        miss = np.where(draw < draws, miss * np.maximum(wrong - draw, 0) / left, miss)
    return 1.0 - miss


def interval(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, (low, high); (0, 1) when nothing was counted.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half /= 1 + z2 / count
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(name: str, hits: np.ndarray) -> dict[str, float]:
    """The mean of `hits` [N] under `name`, with its 95% interval as `name_low` and `name_high`."""
    total, count = float(np.sum(hits)), len(hits)
    low, high = interval(total, count)
    return {name: total / count if count else 0.0, f"{name}_low": low, f"{name}_high": high}


def report_unreadable(unreadable: Mapping[str, str]) -> dict[str, Any]:
    """The part of a result that counts and names (the first of) the pictures that were left out."""
    out: dict[str, Any] = {"unreadable": len(unreadable)}
    if unreadable:
        out["unreadable_pictures"] = list(unreadable.values())[:_NAMED_PICTURES]
    return out


class _Progress:
    """How far it is and how long it will take: a line that rewrites itself, or one now and then."""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._done = label, total, 0
        self._start = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def update(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < (0.2 if self._terminal else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        left = (now - self._start) / self._done * (self._total - self._done)
        text = (
            f"{self._label}: {self._done}/{self._total} pictures,"
            f" {self._done / (now - self._start):.0f}/s, {left:.0f} s left"
        )
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
