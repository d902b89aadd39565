"""The rows that groups of the set's texts need, and the padding in them, as training derives and packs them."""

from typing import Any

import numpy as np

from grain_jax.data.inspect import counting, flaws
from grain_jax.input_pipeline import derived, text_lengths

GROUPS = (1, 8, 16, 32, 64, 128)
MAX_REGIONS = 5  # input.max_regions


class Padding:
    """Packs the caption and best regions of the images of a sample in groups of images, in shuffled order.

    Of images with both kinds of captions every second one counts its synthetic caption, since training draws each
    kind with equal probability.
    """

    def __init__(self):
        self.images = 0
        self._sample = counting.Sample(text_lengths.IMAGES)

    def add(self, caption_tokens: int, description_tokens: list[int]) -> None:
        """Adds the lengths of the texts of an image that training uses, 2..flaws.ROW_LENGTH tokens each."""
        self.images += 1
        self._sample.add(str(self.images), (caption_tokens, description_tokens))

    def result(self) -> dict[str, Any]:
        """`unpacked` (padding of one text a row), and for each group size: groups tried, rows, padding, overflowing.

        `unpacked` and `padding` are shares of the places for tokens; `overflowing` is that of the texts that do not
        fit into the rows, at most `derived.MISFITS`.
        """
        found = self._sample.things()
        if not found:
            return {"row_length": flaws.ROW_LENGTH, "unpacked": None, "groups": []}
        order = np.random.default_rng(0).permutation(len(found))
        captions = np.array([found[i][0] for i in order], np.int32)[:, None]
        descriptions = np.zeros((len(order), MAX_REGIONS), np.int32)
        for row, i in enumerate(order):
            descriptions[row, : len(found[i][1])] = found[i][1]
        tokens = captions[:, 0] + descriptions.sum(axis=1)
        groups = []
        for group in GROUPS:
            whole = len(found) // group * group
            if not whole:
                continue
            texts = dict(
                caption_lengths=captions[:whole],
                description_lengths=descriptions[:whole],
                region_mask=descriptions[:whole] > 0,
                region_scores=np.zeros((whole, MAX_REGIONS), np.float32),
            )
            rows, misfits = derived.smallest_rows([texts], group, flaws.ROW_LENGTH, derived.MISFITS)
            places = whole // group * rows * flaws.ROW_LENGTH
            groups.append(
                {
                    "group": group,
                    "groups": whole // group,
                    "rows": rows,
                    "padding": float(1 - tokens[:whole].sum() / places),
                    "overflowing": misfits,
                }
            )
        unpacked = float(1 - tokens.mean() / ((1 + MAX_REGIONS) * flaws.ROW_LENGTH))
        return {"row_length": flaws.ROW_LENGTH, "unpacked": unpacked, "groups": groups}
