"""Packs the texts of the set: the rows that a group needs, and the padding in them.

Uses the packing of training (`grain_jax/input_pipeline/packing.py`) with enough rows for all texts, so that the
number of rows used is the number that a group needs.
"""

import collections
from typing import Any

import numpy as np
from grain_jax.data.inspect import flaws

from grain_jax.input_pipeline import packing

GROUPS = (1, 8, 16, 32, 64, 128)
MAX_REGIONS = 5  # input.max_regions
FIT = 0.999  # share of the groups whose texts fit the proposed rows
_CHUNK = 1024  # images that are shuffled and packed together; a multiple of every group


class Padding:
    """Packs each image's caption and best regions in groups of images, in shuffled order.

    Of images with both kinds of captions every second one counts its synthetic caption, since training draws each
    kind with equal probability.
    """

    def __init__(self):
        self.tokens = self.images = 0
        # Group size -> {rows: number of groups}; -> tokens in these groups.
        self.rows_needed = {group: collections.Counter() for group in GROUPS}
        self.packed_tokens = dict.fromkeys(GROUPS, 0)
        self._waiting: list[tuple[int, list[int]]] = []
        self._random = np.random.default_rng(0)

    def add(self, caption_tokens: int, description_tokens: list[int]) -> None:
        """Adds the lengths of the texts of an image that training uses, 2..flaws.ROW_LENGTH tokens each."""
        self._waiting.append((caption_tokens, description_tokens))
        if len(self._waiting) == _CHUNK:
            self._pack()

    def _pack(self) -> None:
        order = self._random.permutation(len(self._waiting))
        captions = np.array([self._waiting[i][0] for i in order], np.int32)
        descriptions = np.zeros((len(order), MAX_REGIONS), np.int32)
        for row, i in enumerate(order):
            lengths = self._waiting[i][1]
            descriptions[row, : len(lengths)] = lengths
        tokens = captions + descriptions.sum(axis=1)
        self.images += len(order)
        self.tokens += int(tokens.sum())
        for group, needed in self.rows_needed.items():
            whole = len(order) // group * group
            if whole:
                needed.update(_rows_needed(captions[:whole], descriptions[:whole], group).tolist())
                self.packed_tokens[group] += int(tokens[:whole].sum())
        self._waiting = []

    def result(self) -> dict[str, Any]:
        """`unpacked` (padding of one text a row), and for each group size: groups tried, rows, padding, overflowing.

        `unpacked`, `padding` and `overflowing` are shares in [0, 1].
        """
        if self._waiting:
            self._pack()
        if not self.images:
            return {"row_length": flaws.ROW_LENGTH, "unpacked": None, "groups": []}
        found = []
        for group, needed in self.rows_needed.items():
            tried = needed.total()
            if not tried:  # fewer images than that
                continue
            rows_by_need = sorted(needed.elements())
            rows = rows_by_need[min(tried - 1, int(np.ceil(FIT * tried)) - 1)]
            found.append(
                {
                    "group": group,
                    "groups": tried,
                    "rows": rows,
                    "padding": 1 - self.packed_tokens[group] / (tried * rows * flaws.ROW_LENGTH),
                    "overflowing": sum(n for need, n in needed.items() if need > rows) / tried,
                }
            )
        unpacked = 1 - self.tokens / (self.images * (1 + MAX_REGIONS) * flaws.ROW_LENGTH)
        return {"row_length": flaws.ROW_LENGTH, "unpacked": unpacked, "groups": found}


def _rows_needed(captions: np.ndarray, descriptions: np.ndarray, group: int) -> np.ndarray:
    """The rows that each group needs, int64 [G]; captions int32 [B], descriptions int32 [B, R] (0: none)."""
    tokens = (captions + descriptions.sum(axis=1)).reshape(-1, group).sum(axis=1)
    # First fit leaves at most one row less than half full.
    enough = min(2 * int(tokens.max()) // flaws.ROW_LENGTH + 2, group * (1 + MAX_REGIONS))
    layout = packing.pack(
        caption_lengths=captions[:, None],
        description_lengths=descriptions,
        region_mask=descriptions > 0,
        region_scores=np.zeros(descriptions.shape, np.float32),
        pack_group=group,
        rows=enough,
        row_length=flaws.ROW_LENGTH,
    )
    last = np.maximum(layout.caption_at[:, 0, 0], layout.description_at[..., 0].max(axis=1))
    return last.reshape(-1, group).max(axis=1) + 1
