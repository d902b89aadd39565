"""Images to embeddings: threads read and decode while the device works, and rows are written as they come.

Memory holds a few batches of images and a row group of embeddings, whatever the number of images. A batch may hold
images of several parts, so that small tars leave the device no batch that is not full.
"""

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from grain_jax.data import sources
from grain_jax.data.embed import output, parts

from grain_jax import errors
from grain_jax import progress as progress_lib
from grain_jax.files import embeddings, images
from grain_jax.inference import predictor as predictor_lib
from grain_jax.runtime import processes

# Batches on their way to a device: while one is computed, the next is sent.
AT_DEVICE = 2
_BATCHES_READ = 2  # beside those, in threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class EmbedError(errors.UserError):
    """The embeddings cannot be made; the message is one line."""


class Ready(NamedTuple):
    """An image as the model takes it."""

    id: str
    path: str
    width: int
    height: int
    boxes_xyxy: np.ndarray  # float32 [R, 4] in [0, 1], those that the source has
    pixels: np.ndarray  # uint8 [S, S, 3]


class _End(NamedTuple):
    """The end of a part."""


Entry = Ready | sources.Fault | _End


class Embeds(NamedTuple):
    """The embeddings of a batch."""

    image_embed: np.ndarray  # float32 [B, D]
    region_embed: (
        Sequence[np.ndarray] | None
    )  # B of float32 [R, D]; None: the model finds no regions
    boxes_xyxy: Sequence[np.ndarray] | None  # B of float32 [R, 4] in [0, 1]


Encode = Callable[[list[Ready]], Embeds]


def encoder(predictor: Any, boxes: str = "queries") -> Encode:
    """The function that embeds the images of a batch and their regions.

    Args:
      predictor: the model.
      boxes: whose regions: "queries" of the model, where it has them, or the boxes "given" by the source.
    """

    def encode(batch: list[Ready]) -> Embeds:
        pixels = np.stack([ready.pixels for ready in batch])
        if boxes == "given":
            given = [ready.boxes_xyxy for ready in batch]
            found = Embeds(*predictor.encode_image_and_boxes(pixels, given), given)
        elif predictor.has_regions:
            image, regions = predictor.encode_image_and_regions(pixels)
            found = Embeds(image, regions.embed, regions.boxes_xyxy)
        else:
            found = Embeds(predictor.encode_image(pixels), None, None)
        for values in (
            found.image_embed,
            *(found.region_embed if found.region_embed is not None else ()),
        ):
            if not np.isfinite(values).all():
                raise EmbedError(
                    "the model's embeddings are not finite: the checkpoint cannot be used"
                )
        return found

    return encode


def prepare(read: Callable[[], sources.Image | sources.Fault], size: int) -> Ready | sources.Fault:
    """Reads an image, decodes it and resizes it to `size` pixels."""
    found = read()
    if isinstance(found, sources.Fault):
        return found
    try:
        image = images.decode_image(found.encoded, found.image, found.orientation)
        pixels = images.resize(image, size)
    except images.ImageError as error:
        too_large = isinstance(error, images.TooLargeError)
        return sources.Fault(found.image, "too large" if too_large else "unreadable", str(error))
    boxes = np.array([region.box_xyxy for region in found.regions], np.float32).reshape(-1, 4)
    boxes = np.clip(boxes / np.array([*image.size, *image.size], np.float32), 0, 1)
    return Ready(found.id or found.image, found.image, *image.size, boxes, pixels)


def run(
    job: output.Output,
    mine: Sequence[int],
    encode: Encode,
    *,
    size: int,
    threads: int,
    progress: "Progress",
    before: Sequence[embeddings.Part],
    most_faults: float,
) -> int:
    """Embeds parts and writes their files, in order.

    Args:
      job: the output.
      mine: numbers of the parts.
      encode: the model.
      size: S, pixels of a side.
      threads: that read and decode.
      progress: is told of each image.
      before: the parts that were done already.
      most_faults: number of images that may have a fault, of all parts; one more is an error.

    Returns: number of images, without those that were left out.

    Raises:
      EmbedError: too many images have a fault, or the model gives numbers that are not finite.
    """
    batch_size = predictor_lib.MAX_BATCH * jax.local_device_count()
    writer, count, closed = None, 0, list(before)
    faults_left = most_faults - sum(len(part.faults) for part in before)
    readers, device = ThreadPoolExecutor(threads), ThreadPoolExecutor(AT_DEVICE)
    try:

        def prepared(task: tuple[int, Any]) -> tuple[int, Entry]:
            index, read = task
            return index, _End() if read is None else prepare(read, size)

        def encoded(batch: list[tuple[int, Entry]]) -> tuple[list, Any]:
            ready = [entry for _, entry in batch if isinstance(entry, Ready)]
            return batch, encode(ready) if ready else None

        entries = ahead(prepared, _tasks(job, mine), readers, _BATCHES_READ * batch_size)
        batches = _batches(entries, batch_size)
        # The first one alone: it compiles the program that the others use.
        done = itertools.chain(
            map(encoded, itertools.islice(batches, 1)), ahead(encoded, batches, device, AT_DEVICE)
        )
        for batch, embeds in done:
            at = 0
            for index, entry in batch:
                writer = writer or output.Writer(job, index)
                if isinstance(entry, _End):
                    closed.append(writer.close())
                    progress.end_of_part(job.parts[index]["size"])
                    writer = None
                elif isinstance(entry, sources.Fault):
                    faults_left -= 1
                    fault = {"path": entry.image, "cause": entry.cause, "detail": entry.detail}
                    writer.faults.append(fault)
                    progress.image()
                    if faults_left < 0:
                        job.write_faults([*closed, writer.part()])
                        raise EmbedError(
                            f"{entry.image}: {entry.cause}: {entry.detail}; with it, more images have a fault"
                            " than --max-faults allows;"
                            f" {job.folder / embeddings.FAULTS} names those so far"
                        )
                else:
                    writer.add(_row(entry, embeds, at))
                    at += 1
                    count += 1
                    progress.image()
    finally:
        for pool in (readers, device):
            pool.shutdown(wait=True, cancel_futures=True)
        if writer is not None:
            writer.abandon()
    return count


def _row(ready: Ready, embeds: Embeds, at: int) -> output.Row:
    regions = None if embeds.region_embed is None else embeds.region_embed[at]
    boxes = None if embeds.boxes_xyxy is None else embeds.boxes_xyxy[at]
    return output.Row(*ready[:4], embeds.image_embed[at], regions, boxes)


def _tasks(job: output.Output, mine: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(number of the part, function that reads an image), and a None at the end of each part."""
    for index in mine:
        for read in parts.images(job.parts[index]):
            yield index, read
        yield index, None


def _batches(entries: Iterable[tuple[int, Entry]], size: int) -> Iterator[list[tuple[int, Entry]]]:
    """Entries in groups with `size` images that can be used; the last one may have fewer."""
    batch, ready = [], 0
    for index, entry in entries:
        batch.append((index, entry))
        ready += isinstance(entry, Ready)
        if ready == size:
            yield batch
            batch, ready = [], 0
    if batch:
        yield batch


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor, most: int
) -> Iterator[Result]:
    """`map(function, items)` by the threads of `pool`, in order, at most `most` items in advance."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def default_threads() -> int:
    """One a core, at least two: one waits for the disk while the other decodes."""
    return max(2, os.cpu_count() or 1)


class Progress:
    """Shows how far it is. Only the first process does, and takes the others to be as fast.

    Args:
      label: the source.
      shares: size of each part that is to be done here: images, or bytes of a tar.
      known: whether the sizes are numbers of images.
    """

    def __init__(self, label: str, shares: Sequence[int], known: bool):
        self._all, self._ended, self._known = sum(shares), 0, known
        index, count = processes.process_info()
        total = count * self._all if known else None
        self.counter = progress_lib.Counter(label, total, "images", silent=index > 0, times=count)

    def image(self) -> None:
        """Counts an image."""
        self.counter.add(share=None if self._known else self.share)

    def end_of_part(self, size: int) -> None:
        """Counts a part that is written."""
        self._ended += size

    @property
    def share(self) -> float:
        """Of the bytes of all tars, those of the finished ones."""
        return self._ended / max(self._all, 1)
