"""Embeds images and texts in this process alone.

`evaluate` divides the images among all processes. Only the first process writes a report, and the others may have
ended by then, so the report does not use those functions.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from grain_jax import schema
from grain_jax.evaluate import encode as encode_lib
from grain_jax.evaluate import test_sets
from grain_jax.files import images

_THREADS = 8  # threads that read images


class Seen(NamedTuple):
    """Sizes and embeddings of the n images that could be read."""

    index: np.ndarray  # int [n], positions in the list of images
    sizes: list[tuple[int, int]]  # width, height in pixels
    image_embed: np.ndarray  # float32 [n, D]
    regions: schema.Regions | None  # None if not requested

    @property
    def with_regions(self) -> schema.Regions:
        """`regions`, which must have been requested.

        Raises:
          ValueError: `encode` was called with regions=False.
        """
        if self.regions is None:
            raise ValueError("regions: not computed; pass regions=True to encode")
        return self.regions


def encode(predictor: Any, chosen: Sequence[test_sets.Image], *, regions: bool = True) -> Seen:
    """Embeds images; those that cannot be read are left out.

    Args:
      predictor: the model (see `evaluate.encode.Predictor`).
      chosen: the images.
      regions: whether to compute boxes and region embeddings too.

    Raises:
      test_sets.InputError: no image can be read, or an embedding is not finite.
    """
    model = getattr(predictor, "model", None)  # test doubles may have none

    def read(image: test_sets.Image) -> tuple[Any, tuple[int, int]] | images.ImageError:
        try:
            loaded = image.load()
            resized = images.resize(loaded, model.image.image_size) if model else loaded
            return resized, loaded.size
        except images.ImageError as error:
            return error

    embeds, boxes, region_embeds, sizes, index = [], [], [], [], []
    fault: Exception | None = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(chosen), encode_lib.BATCH_SIZE):
            batch, part = [], chosen[first : first + encode_lib.BATCH_SIZE]
            for i, got in enumerate(pool.map(read, part), first):
                if isinstance(got, images.ImageError):
                    fault = fault or got
                    continue
                batch.append(got[0])
                sizes.append(got[1])
                index.append(i)
            if not batch:
                continue
            if not regions:
                embeds.append(predictor.encode_image(batch))
                continue
            embed, found = predictor.encode_image_and_regions(batch)
            embeds.append(embed)
            boxes.append(found.boxes_xyxy)
            region_embeds.append(found.embed)
    if not index:
        raise test_sets.InputError(f"none of {len(chosen)} images can be read; the first: {fault}")
    seen = schema.Regions(np.concatenate(boxes), np.concatenate(region_embeds)) if regions else None
    embed = np.concatenate(embeds)
    if not all(np.isfinite(x).all() for x in (embed, *(seen or ()))):
        raise test_sets.InputError(
            "the model's embeddings are not finite: the checkpoint cannot be used"
        )
    return Seen(np.array(index), sizes, embed, seen)


def encode_texts(predictor: Any, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """The embeddings of each list of texts, float32 [n, D]; a text in several lists is encoded once."""
    place = {text: i for i, text in enumerate(dict.fromkeys(t for group in texts for t in group))}
    embed = np.asarray(predictor.encode_text(list(place)))
    return [embed[[place[text] for text in group]] for group in texts]
