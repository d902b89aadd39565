"""What every evaluation needs: images in batches, ties, chances and intervals; and `run` and `check`, which pick one.

An evaluation is a function `evaluate(predictor, *, ...)` that returns a JSON-ready dict. The predictor
is an `inference.Predictor` or anything with its `encode_image`, `encode_text` and `encode_regions`.
"""

import dataclasses
import functools
import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors, printable, schema
from grain_jax.evaluate import test_sets
from grain_jax.evaluate.test_sets import InputError, MissingData
from grain_jax.files import annotations as annotations_lib
from grain_jax.files import images
from grain_jax.runtime import processes

BATCH_SIZE = 64
# What to do where memory runs out.
SMALLER = (
    "run grain_jax.evaluate on a checkpoint, where no optimiser state is in memory, with a smaller --batch-size;"
    f" or {errors.MORE_MEMORY}"
)
# Kind of evaluation -> its module, which has `evaluate(predictor, *, ...)`; those of annotations also `read`.
_MODULES = {
    "zeroshot": "grain_jax.evaluate.zeroshot",
    "linear_probe": "grain_jax.evaluate.linear_probe",
    "retrieval": "grain_jax.evaluate.retrieval",
    "grounding": "grain_jax.evaluate.grounding",
    "boxes": "grain_jax.evaluate.box_classes",
    "diagnostics": "grain_jax.evaluate.diagnostics",
}
_THREADS = 8  # that read images; decoding leaves Python's lock
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal
_OF_CLASSES = ("per_class", "pictures_per_class")  # a number for each class: not for a table
_NAMED_PICTURES = 20  # unreadable ones that a result lists
_Z = 1.959963984540054  # of the normal distribution, two sides, 95%


class Encoded(NamedTuple):
    """A batch of readable images and what the model sees in them."""

    index: np.ndarray  # int [B], positions in the whole set
    sizes: list[tuple[int, int]]  # width, height in pixels
    image_embed: np.ndarray  # float32 [B, D]
    regions: schema.Regions | None
    labels: np.ndarray  # int [B], of a test set's images; -1 else


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
    module, entry = _module(entry), _at_home(entry)
    if entry.kind == "zeroshot":
        options |= dict(
            images=test_sets.open_set(entry),
            descriptions=entry.descriptions,
            alphas=_alphas(entry),
            names=entry.names,
            region_order=entry.region_order,
            templates=entry.templates,
        )
    elif entry.kind == "linear_probe":
        test, train = module.open_sets(entry)
        options |= dict(test=test, train=train, shots=entry.shots, seeds=entry.seeds)
    else:
        options |= dict(images=entry.images, annotations=entry.annotations)
    if entry.kind == "boxes":
        options |= dict(classes=entry.classes, templates=entry.templates)
    return module.evaluate(predictor, **options)


def available(entry: config_lib.Evaluator) -> tuple[config_lib.Evaluator, str]:
    """An entry as far as its data is there: where `missing` is "skip", it does without descriptions.

    Returns: the entry, and a line that says what it does without, or "".

    Raises:
      MissingData: `missing` is "skip", and images or annotations are not there; one line.
    """
    if entry.missing != "skip":
        return entry, ""
    if not entry.images and entry.tfds is None:
        raise MissingData(
            f"no images are named; {entry.get}" if entry.get else "no images are named"
        )
    found, there = _at_home(entry), lambda path: epath.Path(path).exists()
    if found.tfds is not None:
        test_sets.find_tfds(found.tfds, found.data_dir, found.get)
    else:
        places = [x for x in (found.annotations, found.images, found.train) if x is not None]
        absent = [place for place in places if not there(place)]
        if absent:
            raise MissingData(f"{', '.join(absent)}: not there{test_sets.how(found.get)}")
    if found.descriptions is None or there(found.descriptions):
        return entry, ""
    line = f"{found.descriptions}: not there, expected descriptions of the classes"
    if not found.names:
        raise MissingData(line)
    return dataclasses.replace(entry, descriptions=None), f"{line}; evaluated by names alone"


def present(entries: Mapping[str, config_lib.Evaluator]) -> dict[str, config_lib.Evaluator]:
    """The entries whose data is there, on every process; what is skipped is a line on stderr."""
    out = {}
    for name, entry in entries.items():
        try:
            out[name], line = processes.run_together(functools.partial(available, entry))
        except MissingData as error:
            line = f"skipped: {error}"
        if line and processes.process_info()[0] == 0:
            print(f"evals.{name}: {line}", file=sys.stderr, flush=True)
    return out


def check(entry: config_lib.Evaluator) -> int:
    """Finds without a model whatever in the entry's files would end an evaluation.

    Faulty lines few enough to be left out, and unknown keys, are reported on stderr.

    Returns: how many images there are.

    Raises:
      MissingData: it is the only fault, and the test set is not there.
      InputError: one line a fault, all of them; `__cause__` is the error if there was but one.
    """
    from grain_jax.evaluate import class_names, zeroshot
    from grain_jax.inference import prompts

    module, entry = _module(entry), _at_home(entry)
    if entry.kind == "linear_probe":
        return module.check(entry)
    found: list[Exception] = []

    def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (errors.UserError, OSError) as error:
            found.append(error)

    if entry.kind == "zeroshot":
        test_set = attempt(test_sets.open_set, entry)
        if entry.descriptions is not None:
            known = (test_set.classes, test_set.stems) if test_set else ((), None)
            attempt(zeroshot.read_descriptions, entry.descriptions, *known, entry.names)
        attempt(zeroshot.check_alphas, _alphas(entry), entry.descriptions, entry.names)
        attempt(zeroshot.check_region_order, entry.region_order)
        if entry.names:
            attempt(prompts.load_templates, entry.templates)
    else:
        attempt(picture_folder, entry.images)
        annotated = attempt(module.read, entry.images, entry.annotations)
        if annotated:
            _report_left_out(entry.annotations, annotated.read)
            attempt(_some_picture, entry.annotations, annotated)
        if entry.kind == "boxes":
            attempt(prompts.load_templates, entry.templates)
            if entry.classes is not None:
                attempt(class_names.read, entry.classes)
    if len(found) == 1 and isinstance(found[0], MissingData):
        raise found[0]
    if found:
        lines = dict.fromkeys(line for error in found for line in str(error).split("\n"))
        raise InputError("\n".join(lines)) from (found[0] if len(found) == 1 else None)
    return len(test_set if entry.kind == "zeroshot" else annotated.records)


def _module(entry: config_lib.Evaluator) -> Any:
    """The module that evaluates this kind. Raises InputError where the entry itself is wrong."""
    if entry.kind not in _MODULES:
        raise InputError(f"kind: got {entry.kind!r}, expected one of {', '.join(_MODULES)}")
    if entry.kind not in config_lib.LABELLED_KINDS and entry.annotations is None:
        raise InputError(f"annotations: got nothing, expected a file (A.jsonl) for {entry.kind}")
    return importlib.import_module(_MODULES[entry.kind])  # only now: they import this module


def _at_home(entry: config_lib.Evaluator) -> config_lib.Evaluator:
    """The entry with paths that do not begin with `~`."""
    names = ["images", "descriptions", "annotations", "templates"]
    if entry.tfds is None:  # else a split
        names.append("train")
    paths = {name: getattr(entry, name) for name in names if getattr(entry, name)}
    paths = {name: str(epath.Path(path).expanduser()) for name, path in paths.items()}
    return dataclasses.replace(entry, **paths)


def _alphas(entry: config_lib.Evaluator) -> Sequence[float]:
    """Without descriptions there is no region score, so 1 alone; alphas that are no shares stay, as faults."""
    if entry.descriptions is not None:
        return entry.alphas
    return [alpha for alpha in entry.alphas if not 0 <= alpha <= 1] or (1.0,)


def _report_left_out(path: epath.PathLike, read: annotations_lib.Annotations) -> None:
    if processes.process_info()[0]:
        return
    lines = list(read.faults)
    if read.faults:  # few enough to go on without their lines
        lines.append(f"{path}: faulty lines left out: {read.faulty_lines}")
    if read.unknown_keys:
        named = ", ".join(
            f"{printable.plain(key, 60)} ({n})" for key, n in read.unknown_keys.items()
        )
        lines.append(f"{path}: unknown keys kept out: {named}")
    if lines:
        print(*(printable.plain(line) for line in lines), sep="\n", file=sys.stderr)


def _some_picture(path: epath.PathLike, annotated: Annotated) -> None:
    """Raises InputError where not one image is there, as below a wrong folder."""
    places = [annotated.folder / record.image for record in annotated.records]
    if not any(place.exists() for place in places):  # mostly ends at the first
        raise InputError(
            f"{annotated.folder}: none of the {len(places)} images of {path} is there; the first:"
            f" {places[0]}; expected the folder that the annotations' paths start from"
        )


def scalars(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a result, nested names joined by `/`; texts and lists are left out."""
    out = {}
    for key, value in result.items():
        if isinstance(value, Mapping) and key not in _OF_CLASSES:
            out |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[prefix + key] = float(value)
    return out


def encode_pictures(
    predictor: Any,
    pictures: test_sets.TestSet | Sequence[epath.PathLike],
    *,
    label: str,
    unreadable: dict[str, str],
    regions: bool = True,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Encoded]:
    """Embeds this process's share of the images; the next batch is read while the model works on this one.

    Of several processes each gets a stretch of the images, and each image is one process's. `allgather`
    brings together what they made of them, in the order of the images.

    Args:
      predictor: encodes lists of PIL images.
      images: a test set, or the images' paths.
      label: what the progress line calls them.
      unreadable: gets, once all are done, name -> reason for each image that was left out, by any process.
      regions: whether region embeddings are wanted too.
      batch_size: images at a time.

    Raises:
      InputError: not a single image could be read, or a test set's files are damaged.
      processes.Failed: another process failed.
    """
    mine = processes.share(len(pictures))
    if hasattr(pictures, "pictures"):
        stretch = pictures.pictures(mine)
    else:
        stretch = (test_sets.of_path(pictures[position]) for position in mine)
    left_out: dict[str, str] = {}
    seen, failure = 0, None
    try:
        with errors.out_of_memory_in_a_line(label, lambda: SMALLER):
            for batch in _batches(
                predictor, stretch, mine, label, len(pictures), left_out, regions, batch_size
            ):
                seen += len(batch.index)
                yield batch
    except Exception as error:  # all have to know before they wait for this one's results
        failure = error
    ends = processes.agree(failure, (seen, left_out, len(pictures)))
    counts, unread, lengths = zip(*ends)
    if len(set(lengths)) > 1:
        raise InputError(
            f"{label}: the processes found {', '.join(map(str, lengths))} images, expected the same"
            " files on all machines"
        )
    for part in unread:
        unreadable |= part
    if not sum(counts):
        first = next(iter(unreadable.values()), "there are none")
        raise InputError(f"none of {len(pictures)} images can be read; the first: {first}")


def _batches(predictor, stretch, mine, label, total, left_out, regions, batch_size):
    """The batches of the images `stretch`, whose positions are `mine`; `left_out` gets the unreadable."""
    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    size = model.image.image_size if model else None

    def read(picture: test_sets.Picture) -> tuple[Any, tuple[int, int]] | str:
        try:
            loaded = picture.load()
        except images.ImageError as error:
            return str(error)
        # Resized here, a batch takes little memory and the work is spread over the threads.
        return images.resize(loaded, size) if size else images.to_rgb(loaded), loaded.size

    progress = _Progress(label, len(mine), total)
    stretch = iter(stretch)
    with ThreadPoolExecutor(_THREADS) as pool:
        submit = lambda: [
            (picture, pool.submit(read, picture))
            for picture in itertools.islice(stretch, batch_size)
        ]
        coming, start = submit(), mine.start
        while coming:
            current, coming = coming, submit()
            batch, sizes, index, labels = [], [], [], []
            for position, (picture, future) in enumerate(current, start):
                got = future.result()
                if isinstance(got, str):
                    left_out[picture.name] = got
                else:
                    batch.append(got[0])
                    sizes.append(got[1])
                    index.append(position)
                    labels.append(picture.label)
            start += len(current)
            if batch:
                embed, found = _encode(predictor, batch, regions)
                yield Encoded(np.array(index), sizes, embed, found, np.array(labels))
            progress.update(len(current))
    progress.close()


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
    embed = encode_distinct(predictor, list(place))
    return [embed[[place[text] for text in group]] for group in texts]


def encode_distinct(predictor: Any, texts: Sequence[str]) -> np.ndarray:
    """Texts -> float32 [N, D]; of several processes each encodes a share, and all get the whole."""
    mine = processes.share(len(texts))
    encode = lambda: np.asarray(predictor.encode_text(list(texts[mine.start : mine.stop])))
    return processes.allgather({"embed": processes.run_together(encode)})["embed"]


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


def interval(successes: float, count: float) -> tuple[float, float]:
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


def mean_rate(name: str, shares: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The mean of the classes' shares of right answers under `name`, with a 95% interval.

    The classes' shares are independent, so that the mean's variance is the sum of p (1 - p) / n over the
    classes, divided by their number squared. With one p for all that is the variance of a share among
    C^2 / sum of 1/n answers, of which the interval is Wilson's: all the answers, where the classes have
    equally many. Where classes differ in p it is wider than need be, never too narrow for equal n.

    Args:
      name: of the number.
      shares: [C] in [0, 1].
      counts: [C], at least 1: how many answers each is a share of.
    """
    mean, number = float(shares.mean()), len(shares) ** 2 / (1 / counts).sum()
    low, high = interval(mean * number, number)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def report_unreadable(unreadable: Mapping[str, str]) -> dict[str, Any]:
    """The part of a result that counts and names (the first of) the images that were left out."""
    out: dict[str, Any] = {"unreadable": len(unreadable)}
    if unreadable:
        out["unreadable_pictures"] = list(unreadable.values())[:_NAMED_PICTURES]
    return out


class _Progress:
    """How far it is and how long it will take: a line that rewrites itself, or one now and then."""

    def __init__(self, label: str, share: int, total: int):
        self._label, self._total, self._done = label, total, 0
        self._times = total / max(share, 1)  # the other processes are about as far
        self._start = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._silent = processes.process_info()[0] > 0

    def update(self, count: int) -> None:
        if self._silent:
            return
        self._done += count * self._times
        now = time.monotonic()
        if now - self._last < (0.2 if self._terminal else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        left = (now - self._start) / self._done * (self._total - self._done)
        text = (
            f"{self._label}: {self._done:.0f}/{self._total} images,"
            f" {self._done / (now - self._start):.0f}/s, {left:.0f} s left"
        )
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal and not self._silent:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
