"""Images to embeddings: threads read and decode while the device works.

Memory holds a few batches of images and the embeddings of a part, whatever the number of images. A batch may hold
images of several parts, so that small tars leave the device no batch that is not full.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from grain_jax.core import images, progress
from grain_jax.data import sources
from grain_jax.data.embed import output, parts
from grain_jax.inference import encoder as predictor_lib
from grain_jax.inference import stream
from grain_jax.runtime import processes

_AT_DEVICE = 2  # batches on their way to a device: while one is computed, the next is sent
_BATCHES_READ = 2  # beside those, in threads


class Ready(NamedTuple):
    """An image as the model takes it."""

    path: str
    caption: str
    id: str
    width: int
    height: int
    boxes_xyxy: np.ndarray  # float32 [R, 4] in [0, 1], those that the source has
    pixels: np.ndarray  # uint8 [S, S, 3]


Encode = Callable[[list[Ready]], list[output.EmbeddedImage]]


def encoder(predictor: Any, boxes: str = "queries") -> Encode:
    """The function that embeds the images of a batch and their regions.

    Args:
      predictor: the model.
      boxes: whose regions: "queries" of the model, where it has them, or the boxes "given" by the source.
    """

    def encode(batch: list[Ready]) -> list[output.EmbeddedImage]:
        pixels = np.stack([ready.pixels for ready in batch])
        embeds: Sequence[Any] = [None] * len(batch)  # of the regions of each image
        corners: Sequence[Any] = embeds
        if boxes == "given":
            corners = [ready.boxes_xyxy for ready in batch]
            image, embeds = predictor.encode_image_and_boxes(pixels, corners)
        elif predictor.has_regions:
            image, (corners, embeds) = predictor.encode_image_and_regions(pixels)
        else:
            image = predictor.encode_image(pixels)
        stream.check_finite(image, *(each for each in embeds if each is not None))
        return [
            output.EmbeddedImage(*ready[:5], *rest)
            for ready, *rest in zip(batch, image, embeds, corners)
        ]

    return encode


def prepare(read: Callable[[], sources.Image | sources.Fault], size: int) -> Ready | sources.Fault:
    """Reads an image, decodes it and resizes it to a square."""
    item = read()
    if isinstance(item, sources.Fault):
        return item
    try:
        image = images.decode_image(item.encoded, item.image)
        pixels = images.resize(image, size)
    except images.ImageError as error:
        too_large = isinstance(error, images.TooLargeError)
        return sources.Fault(item.image, "too large" if too_large else "unreadable", str(error))
    boxes = np.array([region.box_xyxy for region in item.regions], np.float32).reshape(-1, 4)
    boxes = np.clip(boxes / np.array([*image.size, *image.size], np.float32), 0, 1)
    caption = next(iter(item.captions), "")
    return Ready(item.image, caption, item.id or item.image, *image.size, boxes, pixels)


def run(
    job: output.Output,
    mine: Sequence[int],
    encode: Encode,
    *,
    size: int,
    threads: int,
    label: str,
    known: bool,
) -> int:
    """Embeds parts and writes their files, in order.

    Args:
      job: the output.
      mine: numbers of the parts.
      encode: the model.
      size: pixels of a side that the model gets.
      threads: that read and decode.
      label: of the line of progress.
      known: whether the parts say how many images they have.

    Returns: number of images, without those that were left out.

    Raises:
      inference.InputError: the model gives numbers that are not finite.
    """
    batch_size = predictor_lib.MAX_BATCH * jax.local_device_count()
    count, rows, faults = 0, [], []
    total, (first, times) = sum(job.parts[i]["size"] for i in mine), processes.process_info()
    of_all = times * total if known else None
    counter = progress.Counter(label, of_all, "images", silent=first > 0, times=times)
    readers, device = ThreadPoolExecutor(threads), ThreadPoolExecutor(_AT_DEVICE)
    try:

        def prepared(task: tuple[int, Any]) -> tuple[int, Any]:
            index, read = task
            return index, read and prepare(read, size)

        def encoded(batch: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
            ready = [entry for _, entry in batch if isinstance(entry, Ready)]
            embedded = iter(encode(ready) if ready else ())
            is_ready = lambda entry: isinstance(entry, Ready)
            return [(i, next(embedded) if is_ready(entry) else entry) for i, entry in batch]

        entries = stream.ahead(prepared, _tasks(job, mine), readers, _BATCHES_READ * batch_size)
        batches = stream.groups(entries, batch_size, lambda entry: isinstance(entry[1], Ready))
        # The first one alone: it compiles the program that the others use.
        alone = map(encoded, itertools.islice(batches, 1))
        others = stream.ahead(encoded, batches, device, _AT_DEVICE)
        for index, entry in itertools.chain.from_iterable(itertools.chain(alone, others)):
            if entry is None:  # the end of a part
                job.write(index, rows, faults)
                count, rows, faults = count + len(rows), [], []
                continue
            counter.add()
            if isinstance(entry, output.EmbeddedImage):
                rows.append(entry)
            else:
                fault = {"path": entry.image, "cause": entry.cause, "detail": entry.detail}
                faults.append(fault)
    finally:
        for pool in (readers, device):
            pool.shutdown(wait=True, cancel_futures=True)
        counter.close()
    return count


def _tasks(job: output.Output, mine: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(number of the part, function that reads an image), and a None at the end of each part."""
    for index in mine:
        for read in parts.images(job.parts[index]):
            yield index, read
        yield index, None
