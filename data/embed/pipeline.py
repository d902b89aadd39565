"""Images to embeddings: threads read and decode while the device works, and rows are written as they come.

Memory holds a few batches of images and the embeddings of a part, whatever the number of images. A batch may hold
images of several parts, so that small tars leave the device no batch that is not full.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image

from grain_jax.core import errors, images, patches, progress, schema
from grain_jax.data import sources
from grain_jax.data.embed import embeddings, output, parts
from grain_jax.inference import predictor as predictor_lib
from grain_jax.inference import stream
from grain_jax.runtime import processes

_AT_DEVICE = 2  # batches on their way to a device: while one is computed, the next is sent
_BATCHES_READ = 2  # beside those, in threads


class EmbedError(errors.UserError):
    """The embeddings cannot be made; the message is one line."""


class Ready(NamedTuple):
    """An image as the model takes it."""

    id: str
    path: str
    width: int
    height: int
    boxes_xyxy: np.ndarray  # float32 [R, 4] in [0, 1], those that the source has
    pixels: Any  # uint8 [S, S, 3], or the Patches of one image
    caption: str = ""  # the first that the source has
    texts: tuple[str, ...] = ()  # its captions and descriptions, each once


Encode = Callable[[list[Ready]], list[output.EmbeddedImage]]


def encoder(predictor: Any, boxes: str = "queries", texts: bool = False) -> Encode:
    """The function that embeds the images of a batch, their regions and their texts.

    Args:
      predictor: the model.
      boxes: whose regions: "queries" of the model, where it has them, or the boxes "given" by the source.
      texts: whether texts are embedded.
    """

    def encode(batch: list[Ready]) -> list[output.EmbeddedImage]:
        each = [ready.pixels for ready in batch]
        pixels = patches.stack(each) if isinstance(each[0], schema.Patches) else np.stack(each)
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
        of_texts = _text_embeds(predictor, batch) if texts else [((), None)] * len(batch)
        return [
            output.EmbeddedImage(*ready[:4], *rest, ready.caption, *of_text)
            for ready, *rest, of_text in zip(batch, image, embeds, corners, of_texts)
        ]

    return encode


def _text_embeds(predictor: Any, batch: list[Ready]) -> list[tuple[list[int], np.ndarray]]:
    """(digests, embeddings [T, D]) of the texts of each image."""
    place = {text: i for i, text in enumerate(dict.fromkeys(t for r in batch for t in r.texts))}
    vectors = np.zeros((0, predictor.model.embed_dim), np.float32)
    if place:
        vectors = predictor.encode_text(list(place))
        stream.check_finite(vectors)
    return [
        (
            [embeddings.text_digest(text) for text in ready.texts],
            vectors[np.array([place[text] for text in ready.texts], int)],
        )
        for ready in batch
    ]


def prepare(
    read: Callable[[], sources.Image | sources.Fault], resize: Callable[[PIL.Image.Image], Any]
) -> Ready | sources.Fault:
    """Reads an image, decodes it and resizes it."""
    found = read()
    if isinstance(found, sources.Fault):
        return found
    try:
        image = images.decode_image(found.encoded, found.image)
        pixels = resize(image)
    except images.ImageError as error:
        too_large = isinstance(error, images.TooLargeError)
        return sources.Fault(found.image, "too large" if too_large else "unreadable", str(error))
    boxes = np.array([region.box_xyxy for region in found.regions], np.float32).reshape(-1, 4)
    boxes = np.clip(boxes / np.array([*image.size, *image.size], np.float32), 0, 1)
    caption = next(iter(found.captions), "")
    said = (*found.captions, found.synthetic_caption, *(x.description for x in found.regions))
    texts = tuple(dict.fromkeys(filter(None, said)))
    return Ready(found.id or found.image, found.image, *image.size, boxes, pixels, caption, texts)


def run(
    job: output.Output,
    mine: Sequence[int],
    encode: Encode,
    *,
    resize: Callable[[PIL.Image.Image], Any],
    threads: int,
    label: str,
    known: bool,
    before: Sequence[embeddings.Part],
    most_faults: float,
) -> int:
    """Embeds parts and writes their files, in order.

    Args:
      job: the output.
      mine: numbers of the parts.
      encode: the model.
      resize: gives what the model gets of an image; may raise ImageError.
      threads: that read and decode.
      label: of the line of progress.
      known: whether the sizes of the parts are numbers of images; else they are bytes.
      before: the parts that were done already.
      most_faults: number of images that may have a fault, of all parts; one more is an error.

    Returns: number of images, without those that were left out.

    Raises:
      EmbedError: too many images have a fault.
      inference.InputError: the model gives numbers that are not finite.
    """
    batch_size = predictor_lib.MAX_BATCH * jax.local_device_count()
    writer, count, closed, ended = None, 0, list(before), 0
    faults = sum(len(part.faults) for part in before)
    total, (first, times) = sum(job.parts[i]["size"] for i in mine), processes.process_info()
    of_all = times * total if known else None
    counter = progress.Counter(label, of_all, "images", silent=first > 0, times=times)
    readers, device = ThreadPoolExecutor(threads), ThreadPoolExecutor(_AT_DEVICE)
    try:

        def prepared(task: tuple[int, Any]) -> tuple[int, Any]:
            index, read = task
            return index, read and prepare(read, resize)

        def encoded(batch: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
            ready = [entry for _, entry in batch if isinstance(entry, Ready)]
            rows = iter(encode(ready) if ready else ())
            return [(i, next(rows) if isinstance(entry, Ready) else entry) for i, entry in batch]

        entries = stream.ahead(prepared, _tasks(job, mine), readers, _BATCHES_READ * batch_size)
        batches = stream.groups(entries, batch_size, lambda entry: isinstance(entry[1], Ready))
        # The first one alone: it compiles the program that the others use.
        alone = map(encoded, itertools.islice(batches, 1))
        others = stream.ahead(encoded, batches, device, _AT_DEVICE)
        for index, entry in itertools.chain.from_iterable(itertools.chain(alone, others)):
            writer = writer or output.Writer(job, index)
            if entry is None:  # the end of a part
                closed.append(writer.close())
                writer, ended = None, ended + job.parts[index]["size"]
                continue
            counter.add(share=None if known else ended / max(total, 1))
            if isinstance(entry, output.EmbeddedImage):
                writer.add(entry)
                count += 1
                continue
            fault = {"path": entry.image, "cause": entry.cause, "detail": entry.detail}
            writer.faults.append(fault)
            faults += 1
            if faults > most_faults:
                job.write_faults([*closed, writer.part()])
                raise EmbedError(
                    f"{entry.image}: {entry.cause}: {entry.detail}; with it, more images have a fault than"
                    f" --max-faults allows; {job.folder / embeddings.FAULTS} names those so far"
                )
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
