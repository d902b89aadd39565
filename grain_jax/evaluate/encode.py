"""The loop of all evaluators: images in batches through a function, on all processes, results joined."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import inference
from grain_jax.core import ahead, errors, progress, schema
from grain_jax.core import images as image_files
from grain_jax.evaluate import test_sets
from grain_jax.inference import batches, prompts
from grain_jax.inference.inputs import InputError
from grain_jax.input_pipeline import tokenizer
from grain_jax.runtime import processes

BATCH_SIZE = 64
SMALLER = (  # advice when memory runs out
    "run grain_jax.evaluate on a checkpoint, where no optimiser state is in memory, with a smaller"
    f" --batch-size; or {errors.MORE_MEMORY}"
)
_THREADS = 8  # that read images; decoding releases the lock of the Python interpreter
_NAMED_IMAGES = 20  # unreadable images that a result lists, at most

ImageSet: TypeAlias = test_sets.TestSet | Sequence[test_sets.Image | epath.PathLike]


class Batch(NamedTuple):
    """Readable images."""

    index: np.ndarray  # int [B], positions in the whole set
    sizes: np.ndarray  # int [B, 2], width and height in pixels
    labels: np.ndarray  # int [B], positions in the classes of a test set; -1: no label
    pixels: list[Any]  # what `prepare` made of each image


class Encoded(NamedTuple):
    """The readable images of a whole set, encoded."""

    index: np.ndarray  # as in Batch, [N]
    sizes: np.ndarray
    labels: np.ndarray
    image_embed: np.ndarray  # float32 [N, D]
    regions: schema.Regions  # of N images; without regions Q is 0
    box_embed: np.ndarray  # float32 [M, D], image by image; without boxes M is 0
    unreadable: dict[str, str]  # name -> reason for each image that was left out


def over_images(
    images: ImageSet,
    prepare: Callable[[int, PIL.Image.Image], Any],
    function: Callable[[Batch], Mapping[str, np.ndarray]],
    *,
    label: str,
    batch_size: int = BATCH_SIZE,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Calls `function` with each batch of images and joins its results; the next batch is read meanwhile.

    Args:
      images: a test set, images of one, or the paths of images.
      prepare: (position in the set, image) -> its `pixels` in the batch. An ImageError leaves the image out.
      function: a batch -> arrays by name, of any length.
      label: the name of the set in the progress line.
      batch_size: images at a time.

    Returns: the arrays of all batches, in the order of the images, the same on every process; and name ->
      reason for each image that was left out.
    Raises: InputError: no image could be read, or files are damaged; processes.Failed: another one failed.
    """
    mine = processes.share(len(images))
    silent, times = processes.process_info()[0] > 0, len(images) / max(len(mine), 1)
    counter = progress.Counter(label, len(images), "images", silent=silent, times=times)
    unreadable: dict[str, str] = {}
    parts, failure = [], None

    def read(numbered: tuple[int, test_sets.Image]) -> tuple[str, str | tuple]:  # name; fault, or for Batch
        position, image = numbered
        try:
            loaded = image.load()
            return image.name, (position, loaded.size, image.label, prepare(position, loaded))
        except image_files.ImageError as error:
            return image.name, str(error)

    def batches_of(share: range) -> Iterator[Batch]:
        if isinstance(images, Sequence):
            its_images = images[share.start : share.stop]
            stretch = (x if isinstance(x, test_sets.Image) else test_sets.of_path(x) for x in its_images)
        else:
            stretch = images.images(share)
        with ThreadPoolExecutor(_THREADS) as pool:
            items = ahead.in_order(read, enumerate(stretch, share.start), pool, 2 * batch_size)
            for group in batches.groups(items, batch_size, lambda each: isinstance(each[1], tuple)):
                unreadable.update((name, fault) for name, fault in group if isinstance(fault, str))
                if good := [each for _, each in group if isinstance(each, tuple)]:
                    index, sizes, labels, pixels = zip(*good)
                    yield Batch(np.array(index), np.array(sizes), np.array(labels), list(pixels))
                counter.add(len(group))

    try:
        with errors.out_of_memory_in_a_line(label, lambda: SMALLER):
            in_place = functools.cache(lambda: next(batches_of(range(len(images)))))
            for batch, is_mine in processes.rounds(batches_of(mine), in_place):
                result = function(batch)
                parts += [result] if is_mine else []
            counter.close()
    except processes.Failed:
        raise
    # Every process has to learn of it before it waits for the results of this one.
    except Exception as error:
        failure = error
    batched, unread, lengths = zip(*processes.agree(failure, (len(parts), unreadable, len(images))))
    if len(set(lengths)) > 1:
        counts = ", ".join(map(str, lengths))
        raise InputError(
            f"{label}: the processes found {counts} images, expected the same files on all machines"
        )
    unreadable = {name: reason for part in unread for name, reason in part.items()}
    if not any(batched):
        first = next(iter(unreadable.values()), "there are none")
        raise InputError(f"none of {len(images)} images can be read; the first: {first}")
    return processes.allgather(parts), unreadable


def resizing(predictor: inference.Predictor) -> Callable[[int, PIL.Image.Image], np.ndarray]:
    """The `prepare` of a model: its squares, so that a batch needs little memory."""
    size = predictor.model.image.image_size
    return lambda _, image: image_files.resize(image, size)


def embed(
    predictor: inference.Predictor,
    batch: Batch,
    *,
    regions: bool = False,
    boxes_of: Callable[[int, tuple[int, int]], np.ndarray] | None = None,
    predicted_boxes: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays of `Encoded` for a batch. Raises inference.InputError if numbers are not finite.

    Args:
      predictor, batch: the model and what it embeds.
      regions: whether region embeddings are computed too.
      boxes_of: (position of an image in the whole set, (width, height) in pixels) -> boxes to embed too, xyxy
        [n, 4] in [0, 1]; None: no boxes.
      predicted_boxes: whether the box head embeds the boxes of the regions instead.
    """
    if regions:
        image_embed, of_regions = predictor.encode_image_and_regions(batch.pixels)
    else:
        image_embed = np.asarray(predictor.encode_image(batch.pixels))
        shapes = (0, 4), (0, image_embed.shape[1]), (0,)
        of_regions = schema.Regions(*(np.zeros((len(image_embed), *x), np.float32) for x in shapes))
    boxes = of_regions.boxes_xyxy if predicted_boxes else None
    if boxes_of is not None:
        boxes = [boxes_of(*pair) for pair in zip(batch.index.tolist(), batch.sizes.tolist())]
    box_embed = np.zeros((0, image_embed.shape[1]), np.float32)
    if boxes is not None:
        box_embed = np.concatenate(predictor.encode_boxes(batch.pixels, boxes))
    arrays = dict(image_embed=image_embed, **of_regions._asdict(), box_embed=box_embed)
    batches.check_finite(*arrays.values())
    return arrays | dict(index=batch.index, sizes=batch.sizes, labels=batch.labels)


def gather_images(
    predictor: inference.Predictor,
    images: ImageSet,
    *,
    label: str,
    batch_size: int = BATCH_SIZE,
    **embedded: Any,
) -> Encoded:
    """All readable images of a set, encoded, the same on every process.

    `images`, `label`, `batch_size` and errors are as for `over_images`, the others as for `embed`.
    """
    function = functools.partial(embed, predictor, **embedded)
    prepare = resizing(predictor)
    arrays, unreadable = over_images(images, prepare, function, label=label, batch_size=batch_size)
    of_regions = schema.Regions(*(arrays.pop(name) for name in schema.Regions._fields))
    return Encoded(**arrays, regions=of_regions, unreadable=unreadable)


def encode_texts(predictor: inference.Predictor, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each list of texts the embeddings, float32 [n, D]; a text in several lists is encoded once."""
    return prompts.encode_lists(functools.partial(encode_distinct, predictor), texts)


def as_read(text: str) -> str:
    """A text after the tokenizer's cleaning and lower-casing, by which texts are compared."""
    return tokenizer.clean(text).lower()


def encode_distinct(predictor: inference.Predictor, texts: Sequence[str]) -> np.ndarray:
    """Texts -> float32 [N, D]; each of several processes encodes a share, and all get the whole array."""
    mine = [texts[i] for i in processes.padded_share(len(texts))]
    encode = lambda: np.asarray(predictor.encode_text(mine))[: len(processes.share(len(texts)))]
    return processes.allgather([{"embed": processes.run_together(encode)}])["embed"]


def report_unreadable(unreadable: Mapping[str, str]) -> dict[str, Any]:
    """The part of a result that counts the images that were left out, and names the first ones."""
    named = list(unreadable.values())[:_NAMED_IMAGES]
    return {"unreadable": len(unreadable)} | ({"unreadable_images": named} if named else {})
