"""Embeddings of images and texts for evaluations: the processes share the work, and each gets the whole result.

A predictor is an `inference.Predictor`, or any object with the methods of `Predictor` below.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import errors, progress, schema
from grain_jax.core import images as image_files
from grain_jax.evaluate import test_sets
from grain_jax.inference import prompts, stream
from grain_jax.inference.inputs import InputError
from grain_jax.input_pipeline import tokenizer
from grain_jax.runtime import processes

BATCH_SIZE = 64
# Advice of the error message when memory runs out.
SMALLER = (
    "run grain_jax.evaluate on a checkpoint, where no optimiser state is in memory, with a smaller --batch-size;"
    f" or {errors.MORE_MEMORY}"
)
_THREADS = 8  # that read images; decoding releases the lock of the Python interpreter
_NAMED_IMAGES = 20  # unreadable images that a result lists, at most


class Predictor(Protocol):
    """The methods of a model that evaluations call; images are lists of PIL images or uint8 [H, W, 3]."""

    def encode_image(self, images: Any, /) -> np.ndarray:
        """Images -> float32 [B, D]."""
        ...

    def encode_image_and_regions(self, images: Any, /) -> tuple[np.ndarray, schema.Regions]:
        """Images -> float32 [B, D] and regions."""
        ...

    def encode_boxes(self, images: Any, boxes_xyxy: Any, /) -> list[np.ndarray]:
        """Images and boxes [n, 4] of each, in [0, 1] -> float32 [n, D] of each; of models with a box head."""
        ...

    def similarity_maps(self, images: Any, text_embeds: Any, /) -> list[np.ndarray]:
        """Images and embeddings [n, D] of the texts of each -> float32 [n, h, w] of each."""
        ...

    def encode_text(self, texts: Any, /) -> np.ndarray:
        """Strings -> float32 [N, D]."""
        ...


# (position of an image in the whole set, (width, height) in pixels) -> its boxes, xyxy [n, 4] in [0, 1].
BoxesOf: TypeAlias = Callable[[int, tuple[int, int]], np.ndarray]


class Encoded(NamedTuple):
    """Readable images and their embeddings: of a batch, or of a whole set."""

    index: np.ndarray  # int [B], positions in the whole set
    sizes: np.ndarray  # int [B, 2], width and height in pixels
    labels: np.ndarray  # int [B], positions in the classes of a test set; -1: no label
    image_embed: np.ndarray  # float32 [B, D]
    regions: schema.Regions | None  # None: called with regions=False
    box_embed: np.ndarray | None  # float32 [M, D], image by image; None: called without boxes
    pixels: Any = ()  # of a batch: what the model gets

    @property
    def with_regions(self) -> schema.Regions:
        """`regions`. Raises ValueError if there are none."""
        if self.regions is None:
            raise ValueError("regions: not asked for; pass regions=True")
        return self.regions


def gather_images(
    predictor: Predictor,
    images: test_sets.TestSet | Sequence[test_sets.Image | epath.PathLike],
    **options: Any,
) -> Encoded:
    """All readable images, encoded, in order, the same on every process; arguments as of `encode_images`."""
    parts, of_boxes = [], []
    for batch in encode_images(predictor, images, **options):
        arrays = {key: getattr(batch, key) for key in ("index", "sizes", "labels", "image_embed")}
        of_boxes.append({"box_embed": batch.box_embed})
        parts.append(arrays | (batch.regions._asdict() if batch.regions else {}))
    found = processes.allgather(parts)
    regions = {key: found.pop(key) for key in schema.Regions._fields if key in found}
    boxes = processes.allgather(of_boxes)["box_embed"] if options.get("boxes_of") else None
    return Encoded(**found, regions=schema.Regions(**regions) if regions else None, box_embed=boxes)


def encode_images(
    predictor: Predictor,
    images: test_sets.TestSet | Sequence[test_sets.Image | epath.PathLike],
    *,
    label: str,
    unreadable: dict[str, str],
    regions: bool = True,
    boxes_of: BoxesOf | None = None,
    embed: bool = True,
    prepare: Callable[[int, PIL.Image.Image], Any] | None = None,
    consume: Callable[[Encoded], None] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Encoded]:
    """Batches of the images of this process; the next batch is read while the model or the caller has this one.

    Each of several processes gets consecutive images, and each image belongs to one process.
    `processes.allgather` concatenates the results of the processes, in the order of the images.

    Args:
      predictor: the model.
      images: a test set, images of one, or the paths of images.
      label: the name of the set in the progress line.
      unreadable: gets, after the last batch, name -> reason for each image that any process left out.
      regions: whether region embeddings are computed too.
      boxes_of: gives the boxes of each image, which are embedded too; None: no boxes.
      embed: False: nothing is embedded (D is 0, whatever the arguments above), and the caller uses `pixels`.
      prepare: (position in the whole set, image) -> what `pixels` has of it, in place of the resized image; its
        ImageError leaves the image out. It asks for embed=False.
      consume: is called with each batch before it is given; of its errors the other processes learn, too.
      batch_size: images at a time.

    Raises:
      InputError: no image could be read, or the files of a test set are damaged.
      inference.InputError: the model gives numbers that are not finite.
      processes.Failed: another process failed.
    """
    mine = processes.share(len(images))
    if isinstance(images, Sequence):
        stretch = (
            each if isinstance(each, test_sets.Image) else test_sets.of_path(each)
            for each in images[mine.start : mine.stop]
        )
    else:
        stretch = images.images(mine)
    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    size = model.image.image_size if model else None
    silent, times = processes.process_info()[0] > 0, len(images) / max(len(mine), 1)
    counter = progress.Counter(label, len(images), "images", silent=silent, times=times)
    left_out: dict[str, str] = {}
    seen, failure = 0, None

    def read(numbered: tuple[int, test_sets.Image]) -> _Read:
        position, image = numbered
        try:
            loaded = image.load()
            if prepare is not None:
                return _Read(position, image, loaded.size, prepare(position, loaded))
        except image_files.ImageError as error:
            return _Read(position, image, fault=str(error))
        # Resizing here keeps a batch small in memory, and the threads share the work.
        pixels = image_files.resize(loaded, size) if size else image_files.to_rgb(loaded)
        return _Read(position, image, loaded.size, pixels)

    try:
        with (
            errors.out_of_memory_in_a_line(label, lambda: SMALLER),
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            found = stream.ahead(read, enumerate(stretch, mine.start), pool, 2 * batch_size)
            for group in stream.groups(found, batch_size, lambda each: not each.fault):
                left_out |= {each.image.name: each.fault for each in group if each.fault}
                if batch := [each for each in group if not each.fault]:
                    encoded = _encode(predictor, batch, regions and embed, boxes_of, embed)
                    if consume is not None:
                        consume(encoded)
                    yield encoded
                    seen += len(batch)
                counter.add(len(group))
            counter.close()
    # Every process has to learn of it before it waits for the results of this one.
    except Exception as error:
        failure = error
    ends = processes.agree(failure, (seen, left_out, len(images)))
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
        raise InputError(f"none of {len(images)} images can be read; the first: {first}")


class _Read(NamedTuple):
    position: int
    image: test_sets.Image
    size: tuple[int, int] = (0, 0)
    pixels: Any = None
    fault: str = ""  # why it cannot be read


def _encode(
    predictor: Predictor, batch: list[_Read], regions: bool, boxes_of: BoxesOf | None, embed: bool
) -> Encoded:
    pixels = [each.pixels for each in batch]
    image_embed, found, box_embed = np.zeros((len(batch), 0)), None, None
    if regions:
        image_embed, found = predictor.encode_image_and_regions(pixels)
    elif embed:
        image_embed = predictor.encode_image(pixels)
    if boxes_of is not None:
        boxes = [boxes_of(each.position, each.size) for each in batch]
        box_embed = np.concatenate(predictor.encode_boxes(pixels, boxes))
    stream.check_finite(image_embed, *(found or ()), *(() if box_embed is None else (box_embed,)))
    at, sizes, labels = (
        np.array(x) for x in zip(*((each.position, each.size, each.image.label) for each in batch))
    )
    return Encoded(at, sizes, labels, image_embed, found, box_embed, pixels)


def encode_texts(predictor: Predictor, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each list of texts the embeddings, float32 [n, D]; a text in several lists is encoded once."""
    return prompts.encode_lists(functools.partial(encode_distinct, predictor), texts)


def as_read(text: str) -> str:
    """A text after the tokenizer's cleaning and lower-casing, by which texts are compared."""
    return tokenizer.clean(text).lower()


def encode_distinct(predictor: Predictor, texts: Sequence[str]) -> np.ndarray:
    """Texts -> float32 [N, D]; each of several processes encodes a share, and all get the whole array."""
    mine = processes.share(len(texts))
    encode = lambda: np.asarray(predictor.encode_text(list(texts[mine.start : mine.stop])))
    return processes.allgather({"embed": processes.run_together(encode)})["embed"]


def report_unreadable(unreadable: Mapping[str, str]) -> dict[str, Any]:
    """The part of a result that counts the images that were left out, and names the first ones."""
    named = list(unreadable.values())[:_NAMED_IMAGES]
    return {"unreadable": len(unreadable)} | ({"unreadable_pictures": named} if named else {})
