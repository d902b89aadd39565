"""The rows that groups of the set's texts need, and the padding in them, as training derives and packs them."""

from typing import Any

import numpy as np

from grain_jax.data.inspect import counting
from grain_jax.input_pipeline import derived, text_lengths

GROUPS = (1, 8, 16, 32, 64, 128)
MAX_REGIONS = 5  # input.max_regions
ROW_LENGTH = 77  # tokens of a row in CLIP; training cuts longer texts


class Padding:
    """Packs the caption and best regions of the images of a sample in groups of images, in shuffled order."""

    def __init__(self):
        self.images = 0
        self._sample = counting.Sample(text_lengths.IMAGES)

    def add(self, caption_tokens: int, description_tokens: list[int]) -> None:
        """Adds the lengths of the texts of an image that training uses, 2..ROW_LENGTH tokens each."""
        self.images += 1
        lengths = np.zeros(1 + MAX_REGIONS, np.int32)
        lengths[: 1 + len(description_tokens)] = caption_tokens, *description_tokens
        self._sample.add(str(self.images), lengths)

    def result(self) -> dict[str, Any]:
        """`unpacked` (padding of one text a row), and for each group size: groups tried, rows, padding, overflowing.

        `unpacked` and `padding` are shares of the places for tokens; `overflowing` is that of the texts that do not
        fit into the rows, at most `derived.MISFITS`.
        """
        found, length = self._sample.things(), ROW_LENGTH
        if not found:
            return {"row_length": length, "unpacked": None, "groups": []}
        lengths = np.stack(found)[np.random.default_rng(0).permutation(len(found))]
        groups = []
        for group in (group for group in GROUPS if group <= len(found)):
            whole = lengths[: len(found) // group * group]
            texts = dict(
                caption_lengths=whole[:, :1],
                description_lengths=whole[:, 1:],
                region_mask=whole[:, 1:] > 0,
                region_scores=np.zeros((len(whole), MAX_REGIONS), np.float32),
            )
            rows, misfits = derived.smallest_rows([texts], group, length, derived.MISFITS)
            tried = len(whole) // group
            padding = float(1 - whole.sum() / (tried * rows * length))
            told = dict(group=group, groups=tried, rows=rows, padding=padding)
            groups.append({**told, "overflowing": misfits})
        unpacked = float(1 - lengths.sum(axis=1).mean() / ((1 + MAX_REGIONS) * length))
        return {"row_length": length, "unpacked": unpacked, "groups": groups}
