"""The passes over the images of a shard: caption, describe, ground, negatives. No Beam in here.

If a pass fails for an image, the image keeps its other results. It stays in the annotations if these have a text or a
region, and failed.jsonl names what is missing and why. Files of a shard, the last of which marks it as done:

OUTPUT/failed/SHARD.jsonl       faults with their causes
OUTPUT/shards/SHARD.json        counters
OUTPUT/annotations/SHARD.jsonl  lines of A.jsonl
OUTPUT/passes/PASS/SHARD.jsonl  per image the result of the pass, or the cause of its failure
"""

import collections
import concurrent.futures
import dataclasses
import errno
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import PIL.Image

from grain_jax.core import errors
from grain_jax.data import job, negatives, source_lines, sources
from grain_jax.data.annotate import (
    PASSES,
    answers,
    chat,
    checks,
    detector,
    endpoint_chat,
    local_models,
)
from grain_jax.data.annotate.arguments import Annotate

BATCH_PIXELS = 1 << 27  # 400 MB as RGB; 64 photographs of 24 MP would be 4.6 GB
# Images per request that an endpoint answers at a time, so that none waits long for a slow one.
IMAGES_PER_REQUEST = 4
# The name of an image can be the reason of these: a part of it is too long, or is another image's file.
_NO_NAME = (NotADirectoryError, IsADirectoryError, FileExistsError)
FAULT = "fault: "  # begins the counter of a cause
FAILURES_IN_A_ROW = 50  # of a model: then it is not the images' fault, and the job ends
# A pass -> the one whose results it takes. Negatives are of regions of the source, too, and come after the others.
NEEDS = {"describe": "caption", "ground": "describe"}


class ModelDown(errors.UserError):
    """A model or its server failed for many images in a row; the message is one line."""


class Task(NamedTuple):
    """What a worker needs to know; plain values that can be pickled."""

    args: Annotate  # of the command
    prompts: dict[str, chat.Prompt]  # by pass

    @property
    def output(self) -> job.Output:
        """The folder of the results."""
        return job.Output(self.args.output)

    @property
    def kinds(self) -> list[str]:
        """The folders whose files mark a shard as done."""
        return [f"passes/{name}" for name in self.args.passes] or ["annotations"]


@dataclasses.dataclass
class Work:
    """An image on its way through the passes."""

    item: sources.Image | sources.Fault
    image: PIL.Image.Image | None = None
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by pass
    faults: dict[str, list[tuple[str, str]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )  # stage -> (cause, detail)

    def stored(self, name: str) -> list[dict[str, Any]]:
        """The lines of the image in the file of a pass: one, or none if the pass did not run."""
        values = [self.results[name]] if name in self.results else []
        values = values or [dict(cause=c, detail=d) for c, d in self.faults.get(name, ())]
        return [{"image": self.item.image} | value for value in values]

    def regions(self) -> list[dict[str, Any]]:
        """The regions of the source and of the pass ground, with negatives."""
        texts = self.results.get("negatives", {}).get("negatives", {})
        regions = [*map(source_lines.region, self.item.regions)]
        regions += self.results.get("ground", {}).get("regions", [])
        return [
            region | {"negatives": texts[region["description"]]}
            if "negatives" not in region and texts.get(region["description"])
            else region
            for region in regions
        ]


class Passes:
    """The passes of a job with their models, which a worker process loads once.

    Attributes:
      task: names the passes, and how many negatives are made (by rules, without a model).
      chat, detector: None if no pass needs it.

    Raises:
      UserError: a model cannot be loaded, or an endpoint not be used.
    """

    def __init__(self, task: Task):
        args, self.task, self.chat, self.detector = task.args, task, None, None
        self._batch_size, self._failures = args.batch_size, 0  # failures in a row, up to now
        if task.prompts.keys() & set(args.passes):
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
        output, names, file = self.task.output, self.task.args.passes, f"{shard.name}.jsonl"
        known = {
            name: {line.pop("image"): line for line in output.read_lines("passes", name, file)}
            for name in PASSES
        }
        earlier = output.read_json("shards", f"{shard.name}.json")  # with what models have spent
        count = collections.Counter({x: n for x, n in earlier.items() if x.startswith(PASSES)})
        count["shards"] = 1
        for name in names:
            count[f"{name}: results"] = 0
        files: dict[str, list[dict]] = collections.defaultdict(list)
        works = (_work(item, known, self.task.args) for item in sources.read(shard))
        for batch in batches(works, self._batch_size):
            for name in names:
                self._run(name, batch, count)
            for work in batch:
                self._finish(work, files, count)
        # The order matters: the passes' files say that the shard is done.
        output.put_lines(files["failed"], "failed", file)
        output.put_json(count, "shards", f"{shard.name}.json")
        for kind in ("annotations", *(f"passes/{name}" for name in names)):
            output.put_lines(files[kind], kind, file)

    def _finish(self, work: Work, files: dict[str, list[dict]], count: collections.Counter) -> None:
        """Adds an image to the lines of the shard's files and to its counters."""
        line = self._line(work)
        files["annotations"] += [] if line is None else [line]
        for stage in ("region", "image", *PASSES):
            for cause, detail in work.faults.get(stage, ()):
                letter = dict(image=work.item.image, stage=stage, cause=cause, detail=detail)
                files["failed"].append(letter | {"kept": line is not None})
                count[f"{FAULT}{stage}: {cause}"] += 1
        for name in self.task.args.passes:
            count[f"{name}: results"] += name in work.results
            files[f"passes/{name}"] += work.stored(name)
        count["images"] += 1
        count["faulty"] += bool(work.faults.keys() - {"region"})
        count["annotated"] += line is not None
        count["regions"] += len(line["regions"]) if line else 0

    def _run(self, name: str, batch: list[Work], count: collections.Counter) -> None:
        """Runs a pass over the images of a batch that have its inputs and lack its results.

        The method of its name yields a dict, or a Failure or Refused, for each of them.
        """
        needed = NEEDS.get(name)
        todo = [
            work
            for work in batch
            if work.image is not None
            and name not in work.results
            and (needed is None or needed in work.results)
        ]
        if not todo:
            return
        with self._turn:
            start = time.monotonic()
            for work, result in zip(todo, getattr(self, f"_{name}")(todo, count), strict=True):
                work.faults.pop(name, None)  # of an earlier run
                if isinstance(result, dict):
                    work.results[name] = result
                else:
                    work.faults[name].append(tuple(result))
                self._failures = self._failures + 1 if isinstance(result, chat.Failure) else 0
                if self._failures >= FAILURES_IN_A_ROW:
                    raise ModelDown(
                        f"pass {name}: {self._failures} images in a row failed, the last by"
                        f" {result.cause} ({result.detail}); fix it, then give the same command again"
                    )
            count[f"{name}: seconds"] += time.monotonic() - start
        count[f"{name}: images"] += len(todo)

    def _ask(
        self, name: str, works: list[Work], texts: list[str], count: collections.Counter
    ) -> Iterator:
        """The parsed answers about the images; a Failure or Refused if there is none."""
        parse = {"caption": answers.parse_caption, "describe": answers.parse_descriptions}[name]
        for answer in self.chat.answer([work.image for work in works], texts):
            if isinstance(answer, chat.Answer):
                count[f"{name}: prompt tokens"] += answer.prompt_tokens
                count[f"{name}: answer tokens"] += answer.answer_tokens
                answer = parse(answer.text, cut_off=answer.cut_off)
            yield answer

    def _caption(self, works: list[Work], count: collections.Counter) -> Iterator:
        texts = [self.task.prompts["caption"].text] * len(works)
        for result in self._ask("caption", works, texts, count):
            if isinstance(result, dict):
                result["synthetic_caption"] = result.pop("caption")
            yield result

    def _describe(self, works: list[Work], count: collections.Counter) -> Iterator:
        prompt = self.task.prompts["describe"]
        texts = [prompt.about(work.results["caption"]["subject"]) for work in works]
        for result in self._ask("describe", works, texts, count):
            if not isinstance(result, chat.Failure | answers.Refused):
                descriptions, dropped = result
                count.update(f"describe: line left out: {line.cause}" for line in dropped)
                result = {"descriptions": descriptions}
            yield result

    def _ground(self, works: list[Work], count: collections.Counter) -> Iterator:
        texts = [work.results["describe"]["descriptions"] for work in works]
        for result in self.detector.detect([work.image for work in works], texts):
            if isinstance(result, list):
                result = {"regions": list(map(source_lines.region, result))}
            yield result

    def _negatives(self, works: list[Work], count: collections.Counter) -> Iterator:
        for work in works:
            descriptions = dict.fromkeys(region["description"] for region in work.regions())
            most = self.task.args.negatives
            made = {x: negatives.make(x, most, others=descriptions) for x in descriptions}
            count["negatives: texts"] += sum(map(len, made.values()))
            yield {"negatives": made}

    def _line(self, work: Work) -> dict[str, Any] | None:
        """The image's line of A.jsonl; None if it has neither a text nor a region, or cannot be read or stored."""
        if "image" in work.faults:
            return None
        item = work.item
        synthetic = work.results.get("caption", {}).get("synthetic_caption", item.synthetic_caption)
        line = source_lines.line(item._replace(synthetic_caption=synthetic))
        line |= {"regions": work.regions()}
        if not (item.captions or synthetic or line["regions"]):
            if not work.faults:
                detail = "got neither caption nor regions, expected one of them"
                work.faults["image"].append(("no caption", detail))
            return None
        if self.task.args.keep_images and not self._has_stored(work):
            return None
        return line

    def _has_stored(self, work: Work) -> bool:
        """Writes the file of an image that has none, such as one of a tar; False if no file can have its name."""
        output, names = self.task.output, ("images", work.item.image)
        try:
            if output.path(*names).is_dir() or not output.path(*names).exists():
                output.put(work.item.encoded, *names)
        except OSError as error:
            if not isinstance(error, _NO_NAME) and error.errno != errno.ENAMETOOLONG:
                raise
            detail = f"{error.strerror}: cannot be written as a file below {output.path('images')}"
            work.faults["image"].append(("bad annotation", detail))
            return False
        return True


def _work(item: sources.Image | sources.Fault, known: dict[str, dict], args: Annotate) -> Work:
    """An image, decoded and with what earlier runs noted of it."""
    work = Work(item)
    for name, lines in known.items():
        if line := lines.get(item.image):
            if "cause" in line:
                work.faults[name].append((line["cause"], line["detail"]))
            else:
                work.results[name] = line
    checked = item
    if isinstance(item, sources.Image):
        for fault in item.left_out:
            work.faults["region"].append((fault.cause, fault.detail))
        checked = checks.check(item, args)
    if isinstance(checked, sources.Fault):
        work.faults["image"].append((checked.cause, checked.detail))
    else:
        work.image = checked
    return work


def batches(works: Iterable[Work], size: int) -> Iterator[list[Work]]:
    """Lists of `size` images, fewer of large ones; a thread reads the next list while the models run."""
    works = iter(works)

    def take() -> list[Work]:
        batch, pixels = [], 0
        while len(batch) < size and pixels < BATCH_PIXELS:
            work = next(works, None)
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


def counts(output: job.Output, shards: Iterable[str]) -> collections.Counter[str]:
    """The counters of shards, added."""
    total = collections.Counter()
    for shard in shards:
        total.update(output.read_json("shards", f"{shard}.json"))
    return total
