"""A second look at the images of an evaluation, for what the text decoder says of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grain_jax.evaluate import encode, test_sets
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import processes


def gather(
    predictor: Any,
    images: Sequence[test_sets.Image],
    of: Callable[[np.ndarray, Any], dict[str, np.ndarray]],
    *,
    label: str,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """What `of` finds in every batch of images, concatenated in their order, the same on every process.

    Args:
      predictor: the model.
      images: they were read before, and are read again, so that memory holds a batch alone.
      of: (positions int [b], their tokens, of `Predictor.encode_tokens`) -> name -> array.
      label: in the progress line.
      batch_size: images at a time.

    Raises:
      InputError: an image can no longer be read.
    """
    parts: list[dict[str, np.ndarray]] = []
    unreadable: dict[str, str] = {}
    for _ in encode.encode_images(
        predictor,
        images,
        label=label,
        unreadable=unreadable,
        embed=False,
        consume=lambda seen: parts.append(of(seen.index, predictor.encode_tokens(seen.pixels))),
        batch_size=batch_size,
    ):
        pass
    if unreadable:
        raise InputError(
            f"{next(iter(unreadable.values()))}; it was read a moment ago, and is needed again"
        )
    return processes.allgather(parts)
