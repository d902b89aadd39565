"""The passes over the images of a shard: caption, describe, ground, negatives. No Beam in here.

If a pass fails for an image, the image keeps its other results. It stays in the annotations if these have a
text or a region, and failed.jsonl names what is missing and why. Files of a shard:

OUTPUT/annotations/SHARD.jsonl  lines of A.jsonl
OUTPUT/failed/SHARD.jsonl       faults with their causes
OUTPUT/results/SHARD.record     results and faults of the passes by image, for later passes; numbers; digests
OUTPUT/passes/PASS/SHARD.done   empty; marks the shard as done
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import PIL.Image

from grain_jax.core import ahead, annotations, atomic, errors, images, regular_file
from grain_jax.data import job, negatives, sources
from grain_jax.data.annotate import PASSES, answers, chat, detector, endpoint_chat, local_models
from grain_jax.data.annotate.arguments import Annotate
from grain_jax.data.sources import join

BATCH_PIXELS = 1 << 27  # 400 MB as RGB; 64 photographs of 24 MP would be 4.6 GB
IMAGES_PER_REQUEST = 4  # that an endpoint answers at a time, so that none waits long for a slow one
FAULT = "fault: "  # begins the counter of a cause
FAILURES_IN_A_ROW = 50  # of a model: then it is not the images' fault, and the job ends
# A pass -> the one whose results it takes. Negatives are of the source's regions, too, and come last.
NEEDS = {"describe": "caption", "ground": "describe"}


def marks(args: Annotate) -> list[str]:
    """The folders whose files mark a shard as done."""
    return [f"passes/{name}" for name in args.passes or ("none",)]


@dataclasses.dataclass
class Work:
    """An image on its way through the passes."""

    item: sources.Image | sources.Fault
    image: PIL.Image.Image | None = None
    results: dict[str, Any] = dataclasses.field(default_factory=dict)  # by pass
    faults: dict[str, list] = dataclasses.field(default_factory=dict)  # stage -> [cause, detail]

    def regions(self) -> list[dict[str, Any]]:
        """The regions of the source and of the pass ground, with negatives."""
        made = {x: {"negatives": texts} for x, texts in self.results.get("negatives", {}).items() if texts}
        regions = [*map(_region, self.item.regions), *self.results.get("ground", [])]
        return [x if "negatives" in x else x | made.get(x["description"], {}) for x in regions]


class Passes:
    """The passes of a job with their models, which a worker process loads once.

    `chat` and `detector` are None if no pass needs them. Raises UserError: a model cannot be loaded.
    """

    def __init__(self, args: Annotate):
        self.args, self.chat, self.detector = args, None, None
        self.output = job.Output(args.output)
        self._batch_size, self._failures = args.batch_size, 0  # failures in a row, up to now
        if {"caption", "describe"} & set(args.passes):
            if args.endpoint:
                self.chat = endpoint_chat.EndpointChat(args)
                self._batch_size = max(args.batch_size, IMAGES_PER_REQUEST * args.concurrency)
            else:
                self.chat = local_models.LocalChat(args)
        if "ground" in args.passes:
            self.detector = detector.Detector(args)
        self._turn = threading.Lock()  # a worker may have several threads, and a GPU one memory

    def annotate(self, shard: sources.SourceShard) -> None:
        """Runs the passes over a shard and writes its files; results of earlier runs are kept."""
        output, args, names = self.output, self.args, record_of(shard.name)
        known: dict[str, dict] = {}
        with contextlib.suppress(job.Damaged):  # there is none, or `unmark_damaged` named it
            known = {entry["image"]: entry for entry in output.read_record(*names)["images"]}
        lines, failed, results, count = [], [], [], collections.Counter()
        works = (_work(item, known.get(item.image, {}), args) for item in sources.read(shard))
        for batch in batches(works, self._batch_size):
            for name in args.passes:
                self._run(name, batch)
            for work in batch:
                image, line = {"image": work.item.image}, self._line(work)
                lines += [] if line is None else [line]
                faults = [("region", x.cause, x.detail) for x in getattr(work.item, "left_out", ())]
                faults += [(x, *work.faults[x]) for x in ("image", *PASSES) if x in work.faults]
                for stage, cause, detail in faults:
                    fault = {"stage": stage, "cause": cause, "detail": detail}
                    failed.append(image | fault | {"kept": line is not None})
                results.append(image | {"results": work.results, "faults": work.faults})
                count.update(work.results.keys())
                count["faulty"] += bool(work.faults)
        count.update(f"{FAULT}{fault['stage']}: {fault['cause']}" for fault in failed)
        regions = sum(len(line["regions"]) for line in lines)
        count.update(images=len(results), annotated=len(lines), regions=regions)
        if args.keep_images and not regular_file.is_remote(args.output):  # those wait together
            kept = [output.path("images", line["image"]) for line in lines]
            atomic.sync([*kept, *{path.parent for path in kept}])
        digests = {
            f"{kind}/{shard.name}.jsonl": output.put_lines(content, kind, f"{shard.name}.jsonl")
            for kind, content in (("failed", failed), ("annotations", lines))
        }
        output.put_record({"digests": digests, "counts": count, "images": results}, *names)
        for mark in marks(args):
            output.put("", mark, f"{shard.name}.done")

    def close(self) -> None:
        """Closes the connections to an endpoint, which another thread that needs some opens again."""
        with self._turn:
            if isinstance(self.chat, endpoint_chat.EndpointChat):
                self.chat.close()

    def _run(self, name: str, batch: list[Work]) -> None:
        """Runs a pass over the images of a batch that have its inputs and lack its results."""
        todo = [work for work in batch if work.image is not None and name not in work.results]
        if needed := NEEDS.get(name):
            todo = [work for work in todo if needed in work.results]
        with self._turn:
            for work, result in zip(todo, getattr(self, f"_{name}")(todo), strict=True):
                work.faults.pop(name, None)  # of an earlier run
                failed = isinstance(result, chat.Failure)
                if failed or isinstance(result, answers.Refused):
                    work.faults[name] = list(result)
                else:
                    work.results[name] = result
                self._failures = self._failures + 1 if failed else 0
                if self._failures >= FAILURES_IN_A_ROW:
                    raise errors.UserError(
                        f"pass {name}: {self._failures} images in a row failed, the last by"
                        f" {result.cause} ({result.detail}); fix it, then give the same command again"
                    )

    def _ask(self, works: list[Work], texts: list[str], parse: Callable[..., Any]) -> Iterator:
        """The parsed answers about the images; a Failure or Refused if there is none."""
        for answer in self.chat.answer([work.image for work in works], texts):
            is_answer = isinstance(answer, chat.Answer)
            yield parse(answer.text, cut_off=answer.cut_off) if is_answer else answer

    def _caption(self, works: list[Work]) -> Iterator:
        return self._ask(works, [chat.prompt("caption")] * len(works), answers.parse_caption)

    def _describe(self, works: list[Work]) -> Iterator:
        prompt = chat.prompt("describe")
        # Not str.format: the prompt may have other braces.
        texts = [prompt.replace(chat.SUBJECT, work.results["caption"]["subject"]) for work in works]
        return self._ask(works, texts, answers.parse_descriptions)

    def _ground(self, works: list[Work]) -> Iterator:
        texts = [work.results["describe"] for work in works]
        for result in self.detector.detect([work.image for work in works], texts):
            yield list(map(_region, result)) if isinstance(result, list) else result

    def _negatives(self, works: list[Work]) -> Iterator:
        for work in works:
            descriptions = dict.fromkeys(region["description"] for region in work.regions())
            most = self.args.negatives
            yield {x: negatives.make(x, most, others=descriptions) for x in descriptions}

    def _line(self, work: Work) -> dict[str, Any] | None:
        """The line of A.jsonl; None if the image has neither text nor region, or cannot be read or stored."""
        if "image" in work.faults:
            return None
        item, regions = work.item, work.regions()
        synthetic = work.results.get("caption", {}).get("caption", item.synthetic_caption)
        single = len(item.captions) == 1
        line = {
            "image": item.image,
            "caption": item.captions[0] if single else None,
            "captions": None if single else item.captions or None,
            "synthetic_caption": synthetic or None,
            "regions": regions,
            "phrases": item.phrases,
            "id": item.id,
        }
        if not (item.captions or synthetic or regions):
            if not work.faults and not item.left_out:
                detail = "got neither caption nor regions, expected one of them"
                work.faults["image"] = ["no caption", detail]
            return None
        path = self.output.path("images", item.image)
        try:
            keep = self.args.keep_images
            if keep and not (regular_file.is_one(path) and path.read_bytes() == item.encoded):
                self.output.put(item.encoded, "images", item.image, lasting=False)
        except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:  # another image's
            detail = f"{error.strerror}: cannot be written as a file below {path.parent}"
            work.faults["image"] = ["bad annotation", detail]
            return None
        return {key: value for key, value in line.items() if value is not None}


def _work(item: sources.Image | sources.Fault, known: dict[str, Any], args: Annotate) -> Work:
    """An image, decoded and with what earlier runs noted of it."""
    faults = {name: fault for name, fault in known.get("faults", {}).items() if name in PASSES}
    work = Work(item, None, known.get("results", {}), faults)
    image = join.decode(item)
    if isinstance(image, sources.Fault):
        faults["image"] = [image.cause, image.detail]
    elif args.min_side <= min(image.size) and max(image.size) <= args.max_side:
        work.image = images.to_rgb(image)
    else:
        bounds = f"sides from {args.min_side} to {args.max_side}"
        got = f"got {image.width} x {image.height} pixels, expected {bounds}"
        faults["image"] = ["too small" if min(image.size) < args.min_side else "too large", got]
    return work


def batches(works: Iterable[Work], size: int) -> Iterator[list[Work]]:
    """Lists of `size` images, fewer of large ones; a thread reads the next list while the models run."""
    works = iter(works)

    def take() -> list[Work]:
        batch, pixels = [], 0
        while len(batch) < size and pixels < BATCH_PIXELS and (work := next(works, None)):
            batch.append(work)
            pixels += work.image.width * work.image.height if work.image else 0
        return batch

    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming = ahead.in_order(lambda _: take(), itertools.count(), reader, 1)
        yield from itertools.takewhile(len, coming)


def record_of(shard: str) -> tuple[str, str]:
    """The names of the path of a shard's record below the output."""
    return "results", f"{shard}.record"


def unmark_damaged(args: Annotate, output: job.Output, shards: Iterable[str]) -> None:
    """Compares the files of shards with their digests; a damaged shard is named on stderr, to be made again.

    Raises UserError: results of passes that this run does not make are damaged.
    """
    done = {name: output.done(f"passes/{name}") for name in (*PASSES, "none")}
    for shard in shards:
        made = {name for name in done if shard in done[name]}
        lost = made - {"none", *args.passes}
        try:
            if made:
                record = output.read_record(*record_of(shard))
                lost = set()
                output.check(record)
        except job.Damaged as error:
            if lost:
                every = ",".join(name for name in PASSES if name in made | set(args.passes))
                line = f"{error}; it holds results of {','.join(sorted(lost))}: give --passes {every}"
                raise errors.UserError(f"{line} to make its shard again") from None
            print(f"{error}; its shard is made again", file=sys.stderr)
            for mark in marks(args):
                output.path(mark, f"{shard}.done").unlink(missing_ok=True)


def _region(described: annotations.Region) -> dict[str, Any]:
    """The object of a region in a line; one without negatives has no such key."""
    return {key: x for key, x in zip(annotations.REGION_KEYS, described, strict=True) if x != ()}
