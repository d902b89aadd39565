"""Packs the texts of the set: the rows that a group needs, and the padding in them.

Uses the packing of training (`grain_jax/input_pipeline/packing.py`) with room for all texts, so that the
rows it takes are the rows that a group needs.
"""

import collections
from typing import Any

import numpy as np

from data.inspect import flaws
from grain_jax.input_pipeline import packing

GROUPS = (1, 8, 16, 32, 64, 128)
MAX_REGIONS = 5  # input.max_regions
FIT = 0.999  # share of the groups that the proposed number of rows holds
_CHUNK = 1024  # images that are mixed, and packed together; a multiple of every group


class Padding:
    """Packs each image's caption and best regions in groups of images, in a mixed order.

    The caption is the synthetic one of every second image that has both kinds, as training draws them.
    """

    def __init__(self):
        self.tokens = self.images = 0
        self.rows_needed = {group: collections.Counter() for group in GROUPS}  # -> {rows: groups}
        self.packed_tokens = dict.fromkeys(GROUPS, 0)  # what stood in these groups
        self._waiting: list[tuple[int, list[int]]] = []
        self._random = np.random.default_rng(0)

    def add(self, caption_tokens: int, description_tokens: list[int]) -> None:
        """Lengths of the texts of an image that training would take, 2..flaws.ROW_LENGTH tokens each."""
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
        self.images += len(order)
        self.tokens += int(captions.sum() + descriptions.sum())
        for group, needed in self.rows_needed.items():
            whole = len(order) // group * group
            if whole:
                needed.update(_rows_needed(captions[:whole], descriptions[:whole], group).tolist())
                self.packed_tokens[group] += int(
                    captions[:whole].sum() + descriptions[:whole].sum()
                )
        self._waiting = []

    def result(self) -> dict[str, Any]:
        """`unpacked` and `groups`: group, groups (tried), rows, padding and overflowing, shares in [0, 1]."""
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
    """Rows that each group takes, i64[G]. captions i32[B], descriptions i32[B, R] (0: none)."""
    tokens = (captions + descriptions.sum(axis=1)).reshape(-1, group).sum(axis=1)
    # First fit leaves at most one row less than half full.
    enough = min(2 * int(tokens.max()) // flaws.ROW_LENGTH + 2, group * (1 + MAX_REGIONS))
    layout = packing.pack(
        caption_lengths=captions,
        description_lengths=descriptions,
        region_mask=descriptions > 0,
        region_scores=np.zeros(descriptions.shape, np.float32),
        pack_group=group,
        rows=enough,
        row_length=flaws.ROW_LENGTH,
    )
    last = np.maximum(layout.caption_at[:, 0], layout.description_at[..., 0].max(axis=1))
    return last.reshape(-1, group).max(axis=1) + 1
