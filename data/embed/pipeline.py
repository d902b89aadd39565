"""Images to embeddings: threads decode while the device works.

Memory holds a few batches of images and the embeddings of a part. A batch may hold images of several parts,
so that small tars leave the device no batch that is not full.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from grain_jax.core import ahead, images, progress
from grain_jax.data import sources
from grain_jax.data.embed import output
from grain_jax.data.sources import join
from grain_jax.inference import batches, scores
from grain_jax.runtime import processes

MOST_REGIONS = 16  # of the boxes of an image's patches
_AT_DEVICE = 2  # batches on their way to a device: while one is computed, the next is sent
_BATCHES_READ = 2  # beside those, in threads

Encode = Callable[[list[output.Row]], list[output.Row]]


def encoder(predictor: Any) -> Encode:
    """The function that embeds the images of a batch and the regions that the model finds, if it can."""

    def encode(batch: list[output.Row]) -> list[output.Row]:
        pixels = np.stack([row.pixels for row in batch])
        regions = [(None, None)] * len(batch)
        if predictor.has_regions:
            embeds, of_images = predictor.encode_image_and_regions(pixels)
            if predictor.has_proposals:
                of_images = scores.likeliest(of_images, MOST_REGIONS)
            batches.check_finite(of_images.embed)
            regions = zip(of_images.boxes_xyxy, of_images.embed)
        else:
            embeds = predictor.encode_image(pixels)
        batches.check_finite(embeds)
        return [
            row._replace(pixels=None, image_embed=embed, boxes_xyxy=boxes, region_embed=region)
            for row, embed, (boxes, region) in zip(batch, embeds, regions)
        ]

    return encode


def prepare(item: sources.Image | sources.Fault, size: int) -> output.Row | sources.Fault:
    """Decodes an image and resizes it to a square."""
    image = join.decode(item)
    if isinstance(image, sources.Fault):
        return image
    pixels = images.resize(image, size)
    caption = next(iter(item.captions), "")
    return output.Row(item.image, caption, item.id or item.image, *image.size, pixels)


def run(job: output.Embeddings, mine: Sequence[int], encode: Encode, *, size: int, threads: int) -> int:
    """Embeds the parts with the numbers `mine` and writes their files; returns the number of images.

    `encode`, the model, gets images of `size` x `size` pixels, which `threads` decode. Raises
    inference.InputError: the model gives numbers that are not finite.
    """
    batch_size = batches.MAX_BATCH * jax.local_device_count()
    count, rows, faults = 0, [], []
    first, times = processes.process_info()
    counter = progress.Counter("embed", None, "images", silent=first > 0, times=times)
    readers, device = ThreadPoolExecutor(threads), ThreadPoolExecutor(_AT_DEVICE)
    # Each image with the number of its part, and a None at the end of each part.
    items = ((i, item) for i in mine for item in itertools.chain(sources.read(job.parts[i]), [None]))

    def encoded(batch: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        ready = [entry for _, entry in batch if isinstance(entry, output.Row)]
        embedded = iter(encode(ready) if ready else ())
        return [(i, next(embedded) if isinstance(x, output.Row) else x) for i, x in batch]

    def prepared(task: tuple[int, Any]) -> tuple[int, Any]:
        return task[0], task[1] and prepare(task[1], size)

    try:
        entries = ahead.in_order(prepared, items, readers, _BATCHES_READ * batch_size)
        full = batches.groups(entries, batch_size, lambda entry: isinstance(entry[1], output.Row))
        # The first one alone: it compiles the program that the others use.
        alone = map(encoded, itertools.islice(full, 1))
        others = ahead.in_order(encoded, full, device, _AT_DEVICE - 1)
        for index, entry in itertools.chain.from_iterable(itertools.chain(alone, others)):
            if entry is None:  # the end of a part
                job.write(index, rows, faults)
                count, rows, faults = count + len(rows), [], []
                continue
            counter.add(share=mine.index(index) / len(mine))
            if isinstance(entry, output.Row):
                rows.append(entry)
            else:
                fault = {"path": entry.image, "cause": entry.cause, "detail": entry.detail}
                faults.append(fault)
    finally:
        for pool in (readers, device):
            pool.shutdown(wait=True, cancel_futures=True)
        counter.close()
    return count
