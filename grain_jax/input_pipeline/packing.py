"""Packs captions, region descriptions and their hard negatives into rows of text, for each group of images.

A caption has 10-20 tokens and a row 77: with one text per row, most of the work of the text tower is padding.
`pack` computes where every text goes; `fill` writes the tokens there. `one_text_per_row` gives the layout of
padded texts, so the model has one form of input.

The letters B, C, R, H, G and L stand in core/schema.py. S is the number of slots per image: C + R + R H.
"""

from typing import Any, NamedTuple

import numpy as np

MIN_TEXT_LENGTH = 2  # that captions are cut to, at least: start and end token
_CAPTION, _DESCRIPTION, _NEGATIVE = range(3)


class TextArrays(NamedTuple):
    """An array for each kind of text. An image's slots are captions, then descriptions, then negatives."""

    captions: np.ndarray  # [B, C, ...]
    descriptions: np.ndarray  # [B, R, ...]
    negatives: np.ndarray  # [B, R, H, ...]

    def slots(self) -> np.ndarray:
        """[B, S], of arrays without further axes."""
        batch = len(self.captions)
        return np.concatenate([x.reshape(batch, -1) for x in self], axis=1, dtype=np.int32)

    def like_this(self, slots: np.ndarray) -> "TextArrays":
        """The kinds in an array [B, S, ...]."""
        captions, regions = self.captions.shape[1], self.negatives.shape[1]
        parts = np.split(slots, [captions, captions + regions], axis=1)
        parts[2] = parts[2].reshape(*self.negatives.shape, *slots.shape[2:])
        return TextArrays(*parts)


class TextLayout(NamedTuple):
    """Where the texts of a batch stand."""

    # i32[..., 2], (row within the group of the image, position of the end token); (0, 0) for a text that does
    # not exist or was dropped.
    ends: TextArrays
    lengths: TextArrays  # i32, after drops and cuts; zero if a text does not exist or was dropped
    # Bool, texts dropped because their group overflowed (a description goes with its region), and captions
    # cut because the captions of a group alone overflowed.
    misfits: TextArrays
    pack_group: int  # images per group
    rows: int  # per group
    row_length: int  # tokens per row, L


def pack(
    lengths: TextArrays, region_scores: np.ndarray, *, pack_group: int, rows: int, row_length: int
) -> TextLayout:
    """Packs the texts of `pack_group` consecutive images into `rows` rows, first-fit decreasing.

    The layout of a group depends on that group. While it overflows, a text is dropped and the group is packed
    again. Negatives go first: every region loses its last one, the lowest scores first, before any loses the
    one before. Then the region of the lowest score goes; the best of an image goes only if every image of the
    group has one region left. Among equal scores each image loses its last such region before any loses a
    second. If the captions alone overflow, the longest are cut to the largest common length that fits.

    Args:
      lengths: i32, tokens with start and end, 1..row_length; zero if a text does not exist. A region without
        a description has no negatives.
      region_scores: f32[B, R], finite.
      pack_group: images per group; divides B.
      rows: rows per group; at least enough for two tokens of every caption.
      row_length: tokens per row.

    Raises:
      ValueError: the rows do not hold two tokens of every caption.
    """
    by_image = lengths.slots()
    batch, captions = lengths.captions.shape
    regions, negatives = lengths.negatives.shape[1:]
    if rows * (row_length // MIN_TEXT_LENGTH) < pack_group * captions:
        raise ValueError(
            f"{rows} rows of {row_length} tokens cannot hold {pack_group * captions} captions of "
            f"{MIN_TEXT_LENGTH} tokens (pack_group {pack_group}); give a group more rows"
        )
    kind = np.repeat(np.arange(3), (captions, regions, regions * negatives))
    number = np.append(np.zeros(captions + regions, int), np.tile(np.arange(negatives), regions))
    slots = np.stack([kind, number])
    scores = np.zeros(by_image.shape, np.float32)
    scores[:, captions:] = np.append(region_scores, np.repeat(region_scores, negatives, axis=1), axis=1)
    in_groups = (batch // pack_group, -1)
    left, scores = by_image.reshape(in_groups).copy(), scores.reshape(in_groups)
    row, start, fits = _first_fit(left, rows, row_length)
    failing = np.flatnonzero(~fits)
    if failing.size:
        left[failing], row[failing], start[failing] = _shrink(
            left[failing], scores[failing], slots, rows, row_length
        )
    return _layout(lengths, row, start, left, pack_group, rows, row_length)


def one_text_per_row(lengths: TextArrays, *, row_length: int) -> TextLayout:
    """The layout of padded texts: groups of one image, a row per slot. Rows without a text stay padding."""
    by_image = lengths.slots()
    slots = by_image.shape[1]
    row = np.broadcast_to(np.arange(slots), by_image.shape)
    return _layout(lengths, row, np.zeros_like(row), by_image, 1, slots, row_length)


def _layout(lengths: TextArrays, row, start, left, *sizes: int) -> TextLayout:
    """The texts at these rows and starts; `left` are their lengths there."""
    by_image = lengths.slots()
    row, start, left = (x.reshape(by_image.shape) for x in (row, start, left))
    ends = np.stack([row, start + left - 1], axis=-1)
    ends = np.where(left[..., None] > 0, ends, 0).astype(np.int32)
    ends, left, misfits = map(lengths.like_this, (ends, left, left < by_image))
    return TextLayout(ends, left, misfits, *sizes)


def fill(layout: TextLayout, ids: np.ndarray, lengths: TextArrays) -> Any:
    """Writes the tokens of a batch into rows; a cut caption keeps its end token.

    Args:
      layout: from `pack` or `one_text_per_row`.
      ids: i32[sum of all lengths], text after text: all captions, all descriptions, all negatives, each image
        by image, dropped ones included.
      lengths: before drops and cuts, zero if a text does not exist.

    Returns:
      i32[3, G, rows, L]: tokens, 0 in the padding; positions within the text, 0 at its start token and in the
      padding; segments, 1, 2, ... for the texts of a row from left to right, 0 for padding.
    """
    # An entry per text, in the order of `ids`.
    image, length, source_length, row, end = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (np.nonzero(before)[0], left[before > 0], before[before > 0], *ends[before > 0].T)
                for ends, left, before in zip(layout.ends, layout.lengths, lengths)
            )
        )
    )
    source_start = np.cumsum(source_length) - source_length
    kept = length > 0
    image, length, source_length, source_start, row, end = (
        x[kept] for x in (image, length, source_length, source_start, row, end)
    )
    row += image // layout.pack_group * layout.rows  # over all groups
    end += row * layout.row_length  # over all rows
    start = end - length + 1

    groups = len(lengths.captions) // layout.pack_group
    shape = (groups, layout.rows, layout.row_length)
    tokens, positions, segments, starts = (np.zeros(np.prod(shape), np.int32) for _ in range(4))
    # An entry per token.
    position = _counts_up(length)
    into = np.repeat(start, length) + position
    tokens[into] = ids[np.repeat(source_start, length) + position]
    tokens[end] = ids[source_start + source_length - 1]  # differs if a caption was cut
    positions[into] = position
    starts[start] = 1
    segments[into] = np.cumsum(starts.reshape(shape), axis=-1).reshape(-1)[into]
    return np.stack([tokens, positions, segments]).reshape(3, *shape)


def _first_fit(lengths: np.ndarray, rows: int, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First-fit decreasing for all groups at once; equal lengths are placed in the order of the slots.

    Texts of one length fill a row before they take the next, so counting places all texts of a length at
    once. The loop is over lengths, not over texts or groups.

    Returns: row [G, N], start in the row [G, N] (0 if the length is 0, undefined if the group does not
      fit) and fits bool[G].
    """
    groups, slots = lengths.shape
    flat = lengths.reshape(-1)
    sort_type = np.int16 if row_length < 2**15 else np.int32  # 16 bits: a radix sort, much faster
    order = np.argsort(-flat.astype(sort_type), kind="stable")[: np.count_nonzero(flat)]
    bounds = np.flatnonzero(np.diff(flat[order], prepend=-1, append=-1))
    row, start = np.zeros(flat.shape, np.int32), np.zeros(flat.shape, np.int32)
    space = np.full((groups, rows), row_length, dtype=np.int32)
    fits = np.ones(groups, dtype=bool)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        texts = order[first:last]  # of this length, by group and slot
        length = flat[texts[0]]
        count = np.bincount(texts // slots, minlength=groups)[:, None]  # [G, 1]
        room = np.maximum(space, 0) // length  # [G, rows]
        room_up_to = np.cumsum(room, axis=1)
        taken = np.clip(count - room_up_to + room, 0, room)
        # Texts without room go to the last row, so that every text has a place.
        excess = np.maximum(count - room_up_to[:, -1:], 0)
        taken[:, -1:] += excess
        fits &= excess[:, 0] == 0
        used = np.flatnonzero(taken)  # rows that take some, over all groups
        taken_here = taken.reshape(-1)[used]
        row[texts] = np.repeat(used % rows, taken_here)
        start[texts] = np.repeat(row_length - space.reshape(-1)[used], taken_here)
        start[texts] += _counts_up(taken_here) * length
        space -= (taken * length).astype(np.int32)
    return row.reshape(lengths.shape), start.reshape(lengths.shape), fits


def _order_of_dropping(lengths: np.ndarray, scores: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The slots [F, N] of each group in the order in which their texts are dropped; those that stay are last.

    Args: lengths i32[F, N], scores f32[F, N], slots [2, S] as of `_shrink`.
    """
    groups, texts = lengths.shape
    images = texts // slots.shape[1]
    kind, number = np.tile(slots, images)
    is_region = (kind == _DESCRIPTION) & (lengths > 0)
    # The rank of a region in its image, 0 for the best; of equal scores the earlier region is better.
    by_image = np.where(is_region, -scores, np.inf).reshape(groups, images, -1)
    rank = by_image.argsort(-1, kind="stable").argsort(-1).reshape(lengths.shape)
    when = np.where(is_region, np.where(rank > 0, 0, 1), 2)
    when[(kind == _NEGATIVE) & (lengths > 0)] = -1
    # Multiples of 2^32 / golden ratio: neighbours in this order are far apart in the group.
    turn = np.arange(texts) // slots.shape[1] * 2654435761 % 2**32
    return np.lexsort(np.broadcast_arrays(turn, -rank, scores, -number, when))


def _shrink(
    lengths: np.ndarray, scores: np.ndarray, slots: np.ndarray, rows: int, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops negatives, then regions, then cuts captions, of groups that do not fit, until each fits.

    Args: lengths and scores [F, N] of the failing groups; for the slots of an image [2, S], the kind of each
      and which negative of its region it is.
    Returns: lengths (0 if dropped), row, start, each [F, N].
    """
    is_caption = np.tile(slots[0] == _CAPTION, lengths.shape[1] // slots.shape[1])
    can_go = ~is_caption & (lengths > 0)
    dropping = _order_of_dropping(lengths, scores, slots)
    drop_rank = dropping.argsort(axis=1)
    most = can_go.sum(axis=1)
    # More tokens than room never fit: so many texts are dropped at once.
    in_order = np.take_along_axis(np.where(can_go, lengths, 0), dropping, axis=1)
    left = lengths.sum(axis=1, keepdims=True) - np.cumsum(in_order, axis=1)
    dropped = np.minimum(1 + (left > rows * row_length).sum(axis=1), most)
    longest = np.where(is_caption, lengths, 0).max(axis=1)  # [F], what captions are cut to

    result = lengths.copy()
    row, start = np.zeros_like(lengths), np.zeros_like(lengths)
    todo = np.arange(len(lengths))
    while todo.size:
        kept = ~can_go[todo] | (drop_rank[todo] >= dropped[todo, None])
        tried = np.where(kept, lengths[todo], 0)
        tried = np.where(is_caption, np.minimum(tried, longest[todo, None]), tried)
        row[todo], start[todo], fits = _first_fit(tried, rows, row_length)
        result[todo] = tried
        todo = todo[~fits]
        bare = dropped[todo] >= most[todo]
        longest[todo[bare]] -= 1
        dropped[todo[~bare]] += 1
    return result, row, start


def _counts_up(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n of `lengths`, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
