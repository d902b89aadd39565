"""The passes over a shard's images: caption, describe, ground, negatives. No Beam in here.

An image whose pass fails keeps its other results: it stays in the annotations while these have a text or a region,
and failed.jsonl names what is missing and why.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import PIL.Image

from grain_jax.core import errors
from grain_jax.data import negatives, source_lines, sources
from grain_jax.data.annotate import (
    answers,
    checks,
    detector,
    endpoint_chat,
    local_chat,
    outputs,
    own_model,
)
from grain_jax.data.annotate.arguments import OWN, PASSES, Annotate
from grain_jax.data.annotate.chat import Answer, Failure
from grain_jax.data.annotate.prompt import Prompt

# Of a batch: 400 MB as RGB; two batches are held. 64 photographs of 24 MP would be 4.6 GB.
BATCH_PIXELS = 1 << 27
# Requests that wait for each one that an endpoint answers at a time: none waits for a slow one.
BATCHES_AHEAD = 4
# What the name of an image can be the reason of: a part of it is too long, or another image's file.
_NO_NAME = (NotADirectoryError, IsADirectoryError, FileExistsError)
FAILURES_IN_A_ROW = 50  # of a model: then it is not the images' fault, and the job ends
# A pass -> the one whose results it takes. Negatives are of regions of the source, too, and come after the others.
_NEEDS = {"describe": "caption", "ground": "describe"}


def needs(name: str, given: Annotate) -> str | None:
    """The pass whose results a pass takes, or None."""
    return None if given.model else _NEEDS.get(name)


class ModelDown(errors.UserError):
    """A model or its server has failed for many images in a row; the message is one line."""


class Job(NamedTuple):
    """All that a worker needs to know; plain values that can be pickled."""

    given: Annotate  # the arguments of the command
    prompts: dict[str, Prompt]  # by pass; empty with --model

    @property
    def output(self) -> outputs.Output:
        """The files of the job."""
        return outputs.Output(self.given.output)


@dataclasses.dataclass
class _Work:
    """An image on its way through the passes."""

    item: sources.Image | sources.Fault
    image: PIL.Image.Image | None = None
    results: dict[str, dict] = dataclasses.field(default_factory=dict)
    letters: list[dict] = dataclasses.field(default_factory=list)

    def fail(self, stage: str, cause: str, detail: str) -> None:
        self.letters.append(
            {"image": self.item.image, "stage": stage, "cause": cause, "detail": detail}
        )


class Passes:
    """The passes of a job with their models, which are loaded once per worker process.

    Attributes:
      job: whose prompts are asked, and whose number of negatives is made (by rules, without a model).
      chat, own, detector: None where no pass needs it.

    Raises:
      UserError: a model cannot be loaded, or an endpoint not be used.
    """

    def __init__(self, job: Job):
        given, self.job, self.chat, self.own, self.detector = job.given, job, None, None, None
        self._batch_size, self._failures = given.at_once, 0  # the failures in a row, up to now
        writes = bool(set(OWN) & set(given.passes))
        if writes and given.model:
            self.own = own_model.OwnModel(given)
            self._batch_size = self.own.at_once
        elif writes:
            self.chat = (endpoint_chat.EndpointChat if given.endpoint else local_chat.LocalChat)(
                given
            )
            if given.endpoint:
                self._batch_size = max(given.at_once, BATCHES_AHEAD * given.concurrency)
        if "ground" in given.passes:
            self.detector = detector.Detector(given)
        # A worker may have several threads, and a GPU one memory.
        local = isinstance(self.chat, local_chat.LocalChat) or self.own or self.detector
        self._turn = threading.Lock() if local else contextlib.nullcontext()

    def annotate(self, shard: sources.SourceShard) -> None:
        """Runs the passes over a shard and writes its files; results of earlier jobs are kept."""
        output, passes = self.job.output, self.job.given.passes
        known = {
            name: {line["image"]: line for line in output.read(f"passes/{name}", shard.name)}
            for name in PASSES
        }
        old_letters = collections.defaultdict(list)
        for letter in output.read("failed", shard.name):
            del letter["kept"]
            old_letters[letter["image"]].append(letter)
        tallies = {name: collections.Counter() for name in passes}
        lines, letters, faulty, works = [], [], 0, 0
        found = {name: [] for name in passes}
        for batch in _batches(_read(shard, self.job, known, old_letters), self._batch_size):
            for name in passes:
                self._run(name, batch, tallies[name])
            for work in batch:
                line = _finish(work, self.job)
                lines += [] if line is None else [line]
                letters += [letter | {"kept": line is not None} for letter in work.letters]
                faulty += any(letter["stage"] != "region" for letter in work.letters)
                for name in found.keys() & work.results.keys():
                    found[name].append(work.results[name])
            works += len(batch)
        before = output.tally(shard.name)
        tally = {
            "shards": 1,
            "pictures": works,
            "annotated": len(lines),
            "faulty": faulty,
            "regions": sum(len(line["regions"]) for line in lines),
            "failures": collections.Counter(f"{x['stage']}: {x['cause']}" for x in letters),
            "results": before.get("results", {}) | {name: len(found[name]) for name in found},
            "passes": outputs.add(before.get("passes", {}), tallies),
        }
        # The order matters: the passes' files say that the shard is done.
        output.write("failed", shard.name, letters)
        output.put_tally(shard.name, tally)
        output.write("annotations", shard.name, lines)
        for name in passes:
            output.write(f"passes/{name}", shard.name, found[name])

    def _run(self, name: str, batch: list[_Work], tally: collections.Counter) -> None:
        """Runs a pass over the images of a batch that have its inputs and lack its results.

        The method of its name yields a dict, or a Failure or Refused, for each of them.
        """
        before = needs(name, self.job.given)
        todo = [
            work
            for work in batch
            if work.image is not None
            and name not in work.results
            and (before is None or before in work.results)
        ]
        if not todo:
            return
        with self._turn:
            start = time.monotonic()
            for work, found in zip(todo, getattr(self, f"_{name}")(todo, tally), strict=True):
                if isinstance(found, dict):
                    work.results[name] = {"image": work.item.image} | found
                else:
                    work.fail(name, found.cause, found.detail)
                self._failures = self._failures + 1 if isinstance(found, Failure) else 0
                if self._failures >= FAILURES_IN_A_ROW:
                    raise ModelDown(
                        f"pass {name}: {self._failures} images in a row failed, the last by"
                        f" {found.cause} ({found.detail}); fix it, then give the same command again"
                    )
            tally["seconds"] += time.monotonic() - start
        tally["pictures"] += len(todo)

    def _ask(
        self,
        works: list[_Work],
        texts: list[str],
        parse: Callable[..., Any],
        tally: collections.Counter,
    ) -> Iterator:
        """The parsed answers about the images; a Failure or Refused where there is none."""
        for answer in self.chat.answer([work.image for work in works], texts):
            if isinstance(answer, Answer):
                tally["prompt tokens"] += answer.prompt_tokens
                tally["answer tokens"] += answer.answer_tokens
                answer = parse(answer.text, cut_off=answer.cut_off)
            yield answer

    def _caption(self, works: list[_Work], tally: collections.Counter) -> Iterator:
        if self.own:
            yield from self.own.caption([work.image for work in works])
            return
        texts = [self.job.prompts["caption"].text] * len(works)
        for found in self._ask(works, texts, answers.parse_caption, tally):
            if isinstance(found, dict):
                found["synthetic_caption"] = found.pop("caption")
            yield found

    def _describe(self, works: list[_Work], tally: collections.Counter) -> Iterator:
        if self.own:
            yield from self._describe_boxes(self.own, works, tally)
            return
        ask = self.job.prompts["describe"]
        texts = [ask.about(work.results["caption"]["subject"]) for work in works]
        for found in self._ask(works, texts, answers.parse_descriptions, tally):
            if not isinstance(found, Failure | answers.Refused):
                descriptions, dropped = found
                tally["descriptions"] += len(descriptions)
                tally.update(f"line left out: {line.cause}" for line in dropped)
                found = {"descriptions": descriptions}
            yield found

    def _describe_boxes(
        self, own: own_model.OwnModel, works: list[_Work], tally: collections.Counter
    ) -> Iterator:
        found = own.describe([(work.image, work.item.regions) for work in works])
        for described in found:
            if isinstance(described, Failure):
                yield described
                continue
            tally["regions"] += len(described.regions)
            tally.update(f"line left out: {line.cause}" for line in described.left_out)
            if described.is_kept:
                yield {}
            else:
                yield {"regions": list(map(source_lines.region, described.regions))}

    def _ground(self, works: list[_Work], tally: collections.Counter) -> Iterator:
        texts = [work.results["describe"]["descriptions"] for work in works]
        for found in self.detector.detect([work.image for work in works], texts):
            if not isinstance(found, Failure):
                tally["regions"] += len(found)
                found = {"regions": list(map(source_lines.region, found))}
            yield found

    def _negatives(self, works: list[_Work], tally: collections.Counter) -> Iterator:
        for work in works:
            descriptions = dict.fromkeys(region["description"] for region in _regions(work))
            made = {
                text: negatives.make(text, self.job.given.negatives, others=descriptions)
                for text in descriptions
            }
            tally["negatives"] += sum(map(len, made.values()))
            tally["descriptions without a word of the rules"] += sum(not x for x in made.values())
            yield {"negatives": made}


def _regions(work: _Work) -> list[dict[str, Any]]:
    """The regions of the source, or what --model made of them, and those of the pass ground; with negatives."""
    found = work.results.get("ground", {}).get("regions", [])
    anew = _described_anew(work)
    of_source = map(source_lines.region, work.item.regions) if anew is None else anew
    made = work.results.get("negatives", {}).get("negatives", {})
    regions = []
    for region in (*of_source, *found):
        texts = made.get(region["description"])
        add = texts and "negatives" not in region
        regions.append(region | {"negatives": texts} if add else region)
    return regions


def _described_anew(work: _Work) -> list[dict[str, Any]] | None:
    """The regions that the pass describe of --model puts in the place of the source's; None: these stay."""
    return work.results.get("describe", {}).get("regions")


def _line(work: _Work) -> dict[str, Any] | None:
    """The line of A.jsonl for the image; None if it has neither a text nor a region."""
    item = work.item
    if _described_anew(work) is not None:
        item = item._replace(phrases=None)  # of the descriptions before
    synthetic = work.results.get("caption", {}).get("synthetic_caption", item.synthetic_caption)
    out = source_lines.line(item._replace(synthetic_caption=synthetic)) | {
        "regions": _regions(work)
    }
    return out if item.captions or synthetic or out["regions"] else None


def _read(shard: sources.SourceShard, job: Job, known: dict, letters: dict) -> Iterator[_Work]:
    """The shard's images, decoded and with what earlier jobs found."""
    passes = job.given.passes
    before = needs(passes[0], job.given) if passes else None
    for item in sources.read(shard):
        results = {name: known[name][item.image] for name in known if item.image in known[name]}
        work = _Work(item, results=results, letters=letters.get(item.image, []))
        if before and before not in results:  # an earlier job has dealt with it
            yield work
            continue
        earlier = set(PASSES) - set(passes)
        work.letters = [letter for letter in work.letters if letter["stage"] in earlier]
        found = item
        if isinstance(item, sources.Image):
            for region_fault in item.left_out:
                work.fail("region", region_fault.cause, region_fault.detail)
            found = checks.check(item, job.given)
        if isinstance(found, sources.Fault):
            work.fail("picture", found.cause, found.detail)
        else:
            work.image = found
        yield work


def _batches(items: Iterable[_Work], size: int) -> Iterator[list[_Work]]:
    """Lists of `size` items, fewer of large images; one is read ahead by a thread while the models run."""
    items = iter(items)

    def take() -> list[_Work]:
        batch, pixels = [], 0
        while len(batch) < size and pixels < BATCH_PIXELS:
            work = next(items, None)
            if work is None:
                break
            batch.append(work)
            pixels += work.image.width * work.image.height if work.image else 0
        return batch

    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(take)
        while batch := waiting.result():
            waiting = reader.submit(take)
            yield batch


def _finish(work: _Work, job: Job) -> dict[str, Any] | None:
    """The line of the image, or None; also writes the file of the image where the source has none."""
    if any(letter["stage"] == "picture" for letter in work.letters):
        return None
    line = _line(work)
    if line is None and not work.letters:
        work.fail("picture", "no caption", "got neither caption nor regions, expected one of them")
    if line is not None and job.given.keep_images:
        path = job.output.path("images", work.item.image)
        try:
            if path.is_dir() or not path.exists():
                job.output.put(work.item.encoded, "images", work.item.image)
        except OSError as error:
            if not isinstance(error, _NO_NAME) and error.errno != errno.ENAMETOOLONG:
                raise
            reason = error.strerror or "a folder has the name"
            detail = f"{reason}: cannot be written as a file below {job.output.path('images')}"
            work.fail("picture", "bad annotation", detail)
            return None
    return line
