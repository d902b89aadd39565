"""Packs captions and region descriptions into rows of text, for each group of images.

A caption has 10-20 tokens and a row 77: with one text per row, most of the work of the text tower is padding.
`pack` computes a Layout, the place of every text; `fill` writes the tokens there. Padded texts have a layout, too
(`one_text_per_row`), so the model has one form of input.
Letters: B images, C captions and R regions an image, G = B / pack_group groups, L = row_length.
"""

from typing import NamedTuple

import numpy as np

MIN_TEXT_LENGTH = 2  # start and end token


class Layout(NamedTuple):
    """The places of the texts of a batch, and the texts that did not fit.

    Attributes:
      caption_at: i32[B, C, 2], (row within the group of the image, position of the end token); (0, 0) where there is
        no caption.
      description_at: i32[B, R, 2], the same for descriptions; (0, 0) where masked.
      region_mask: bool[B, R], regions that are real and were not dropped.
      caption_lengths: i32[B, C], after a cut; 0 where there is no caption.
      description_lengths: i32[B, R], 0 where masked.
      texts_dropped: descriptions dropped (with their regions) because a group overflowed.
      captions_cut: captions shortened because the captions of a group alone overflowed.
      pack_group: images per group.
      rows: rows per group.
      row_length: tokens per row, L.
    """

    caption_at: np.ndarray
    description_at: np.ndarray
    region_mask: np.ndarray
    caption_lengths: np.ndarray
    description_lengths: np.ndarray
    texts_dropped: int
    captions_cut: int
    pack_group: int
    rows: int
    row_length: int


class PackedText(NamedTuple):
    """Rows of tokens, each i32[G, rows, L].

    Attributes:
      tokens: ids, 0 in the padding.
      positions: position within the text, 0 at its start token and in the padding.
      segments: 1, 2, ... for the texts of a row from left to right, 0 for padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def pack(
    *,
    caption_lengths: np.ndarray,
    description_lengths: np.ndarray,
    region_mask: np.ndarray,
    region_scores: np.ndarray,
    pack_group: int,
    rows: int,
    row_length: int,
) -> Layout:
    """Packs the texts of `pack_group` consecutive images into `rows` rows, first-fit decreasing.

    The layout of a group depends on that group alone. While a group overflows, the region of the lowest score is
    dropped and the group is packed again; the best region of an image is dropped only where every image of the
    group has one region left. Among equal scores each image loses its last such region before any image loses a
    second. If the captions alone overflow, the longest are cut to the largest common length that fits.

    Args:
      caption_lengths: i32[B, C], tokens with specials, 2..row_length; 0 where there is no caption.
      description_lengths: i32[B, R], the same; ignored where masked.
      region_mask: bool[B, R], True where a region is real.
      region_scores: f32[B, R], finite; ignored where masked.
      pack_group: images per group; divides B.
      rows: rows per group; at least enough for two tokens of every caption.
      row_length: tokens per row.

    Raises:
      ValueError: an argument is outside these bounds.
    """
    region_mask = np.asarray(region_mask, dtype=bool)
    lengths = _text_lengths(caption_lengths, description_lengths, region_mask, row_length)
    batch, slots = lengths.shape  # the captions come first
    captions = np.shape(caption_lengths)[1]
    if pack_group < 1 or batch % pack_group:
        raise ValueError(
            f"pack_group {pack_group} does not divide the batch of {batch} images; "
            "choose text.pack_group so that it divides the images of a micro-batch on a device"
        )
    if rows * (row_length // MIN_TEXT_LENGTH) < pack_group * captions:
        raise ValueError(
            f"{rows} rows of {row_length} tokens cannot hold {pack_group * captions} captions of "
            f"{MIN_TEXT_LENGTH} tokens (pack_group {pack_group}); give a group more rows"
        )
    scores = np.zeros(lengths.shape, dtype=np.float32)
    scores[:, captions:] = np.where(region_mask, region_scores, 0)
    if not np.isfinite(scores).all():
        image, slot = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"the score of region {slot - captions} of image {image} is {scores[image, slot]}, expected a "
            "finite number; rebuild the records"
        )
    lengths = lengths.reshape(batch // pack_group, pack_group * slots)  # [G, group's slots]
    row, start, fits = _first_fit(lengths, rows, row_length)
    failing = np.flatnonzero(~fits)
    if failing.size:
        lengths[failing], row[failing], start[failing] = _shrink(
            lengths[failing],
            scores.reshape(lengths.shape)[failing],
            captions,
            slots,
            rows,
            row_length,
        )
    of_image = (batch, slots)
    return _layout(
        row.reshape(of_image),
        start.reshape(of_image),
        lengths.reshape(of_image),
        caption_lengths=np.asarray(caption_lengths),
        region_mask=region_mask,
        pack_group=pack_group,
        rows=rows,
        row_length=row_length,
    )


def one_text_per_row(
    *,
    caption_lengths: np.ndarray,
    description_lengths: np.ndarray,
    region_mask: np.ndarray,
    row_length: int,
) -> Layout:
    """The layout of padded texts: groups of one image, caption c in row c, description r in row C + r.

    Rows of masked regions and of captions that are not there stay padding. Arguments and errors as in `pack`.
    """
    region_mask = np.asarray(region_mask, dtype=bool)
    lengths = _text_lengths(caption_lengths, description_lengths, region_mask, row_length)
    return _layout(
        np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape),
        np.zeros_like(lengths),
        lengths,
        caption_lengths=np.asarray(caption_lengths),
        region_mask=region_mask,
        pack_group=1,
        rows=lengths.shape[1],
        row_length=row_length,
    )


def _layout(row, start, lengths, *, caption_lengths, region_mask, **sizes: int) -> Layout:
    """The layout of texts at these rows and starts, i32[B, C + R] each, of lengths that are 0 where there is none."""
    captions = caption_lengths.shape[1]
    at = np.stack([row, start + lengths - 1], axis=-1)  # [B, C + R, 2]
    at = np.where(lengths[..., None] > 0, at, 0).astype(np.int32)
    kept = lengths[:, captions:] > 0
    return Layout(
        caption_at=at[:, :captions],
        description_at=at[:, captions:],
        region_mask=kept,
        caption_lengths=lengths[:, :captions].copy(),
        description_lengths=lengths[:, captions:].copy(),
        texts_dropped=int(region_mask.sum() - kept.sum()),
        captions_cut=int((lengths[:, :captions] < caption_lengths).sum()),
        **sizes,
    )


def fill(
    layout: Layout,
    *,
    caption_ids: np.ndarray,
    caption_lengths: np.ndarray,
    description_ids: np.ndarray,
    description_lengths: np.ndarray,
    region_mask: np.ndarray,
) -> PackedText:
    """Writes the tokens of a batch to their places in the layout; a cut caption keeps its end token.

    Args:
      layout: from `pack` or `one_text_per_row`.
      caption_ids: i32[sum(caption_lengths)], the tokens of the captions, text after text, image by image.
      caption_lengths: i32[B, C], of the tokenizer (before a cut); 0 where there is no caption.
      description_ids: i32[sum(description_lengths)], the same for the real regions, in the order
        of `region_mask`, row by row, those included that the layout dropped.
      description_lengths: i32[number of real regions].
      region_mask: bool[B, R], the real regions BEFORE drops, as given to `pack`.

    Raises:
      ValueError: the shapes of lengths, ids and mask contradict each other.
    """
    region_mask = np.asarray(region_mask, dtype=bool)
    caption_lengths = np.asarray(caption_lengths)
    batch = layout.caption_at.shape[0]
    for name, got, expected in (
        ("region_mask", region_mask.shape, layout.region_mask.shape),
        ("caption_lengths", caption_lengths.shape, layout.caption_lengths.shape),
        ("caption_ids", np.shape(caption_ids), (int(np.sum(caption_lengths)),)),
        ("description_lengths", np.shape(description_lengths), (int(region_mask.sum()),)),
        ("description_ids", np.shape(description_ids), (int(np.sum(description_lengths)),)),
    ):
        if got != expected:
            raise ValueError(f"{name} has shape {got}, expected {expected} by the layout and mask")
    # One entry per kept text: its start and length in the source, its length in the rows, and its end there
    # (counted over all rows of all groups).
    kept = layout.region_mask[region_mask]  # [number of real regions]
    is_caption = caption_lengths > 0
    chosen = np.concatenate([np.ones(is_caption.sum(), dtype=bool), kept])
    source_length = np.concatenate([caption_lengths[is_caption], description_lengths])
    source_start = (np.cumsum(source_length) - source_length)[chosen]
    source_end = source_start + source_length[chosen] - 1
    length = np.concatenate(
        [layout.caption_lengths[is_caption], layout.description_lengths[layout.region_mask]]
    )
    first_row = np.arange(batch) // layout.pack_group * layout.rows  # of the group of the image
    image = np.concatenate([np.nonzero(is_caption)[0], np.nonzero(layout.region_mask)[0]])
    at = np.concatenate([layout.caption_at[is_caption], layout.description_at[layout.region_mask]])
    end = (first_row[image] + at[:, 0]) * layout.row_length + at[:, 1]
    start = end - length + 1

    shape = (batch // layout.pack_group, layout.rows, layout.row_length)
    tokens, positions, segments, starts = (np.zeros(np.prod(shape), np.int32) for _ in range(4))
    # One entry per token.
    position = _counts_up(length)
    into = np.repeat(start, length) + position
    source = np.concatenate([caption_ids, description_ids])
    tokens[into] = source[np.repeat(source_start, length) + position]
    tokens[end] = source[source_end]  # changes something only where a caption was cut
    positions[into] = position
    starts[start] = 1
    segments[into] = np.cumsum(starts.reshape(shape), axis=-1).reshape(-1)[into]
    return PackedText(*(x.reshape(shape) for x in (tokens, positions, segments)))


def padding_share(segments: np.ndarray) -> float:
    """The share of tokens in [0, 1] that are padding (segment 0), of any batch of rows."""
    return float(np.mean(np.asarray(segments) == 0))


def _text_lengths(caption_lengths, description_lengths, region_mask, row_length) -> np.ndarray:
    """Captions and descriptions as i32[B, C + R], 0 where there is none, or a ValueError."""
    caption_lengths = np.asarray(caption_lengths)
    description_lengths = np.asarray(description_lengths)
    expected = (*caption_lengths.shape[:1], *region_mask.shape[1:])
    if caption_lengths.ndim != 2 or not region_mask.shape == description_lengths.shape == expected:
        raise ValueError(
            f"shapes do not agree: caption_lengths {caption_lengths.shape}, description_lengths "
            f"{description_lengths.shape}, region_mask {region_mask.shape}; expected [B, C], [B, R], "
            "[B, R]"
        )
    lengths = np.concatenate(
        [caption_lengths, np.where(region_mask, description_lengths, 0)], axis=1
    ).astype(np.int32)
    captions = caption_lengths.shape[1]
    real = np.concatenate([caption_lengths != 0, region_mask], axis=1)
    wrong = real & ((lengths < MIN_TEXT_LENGTH) | (lengths > row_length))
    if wrong.any():
        image, slot = np.argwhere(wrong)[0]
        which = f"caption {slot}" if slot < captions else f"description {slot - captions}"
        raise ValueError(
            f"{which} of image {image} has {lengths[image, slot]} tokens, expected "
            f"{MIN_TEXT_LENGTH}..{row_length}; tokenize with context_length <= {row_length}"
        )
    return lengths


def _first_fit(
    lengths: np.ndarray, rows: int, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First-fit decreasing for all groups at once; equal lengths are placed in the order of the slots.

    Texts of one length fill a row before they take the next, so all texts of a length are placed by counting: the
    loop is over lengths, not over texts or groups.

    Returns: row [G, N], start in the row [G, N] (0 where the length is 0, undefined where the group does not
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


def _order_of_dropping(is_region: np.ndarray, scores: np.ndarray, slots: int) -> np.ndarray:
    """The slots [F, N] of each group in the order in which their regions are dropped; slots without one are last.

    Args: is_region bool[F, N], scores f32[F, N], slots of an image.
    """
    of_image = (len(scores), -1, slots)
    # The rank of a region in its image, 0 for the best; of equal scores the earlier region is better.
    better_first = np.where(is_region, -scores, np.inf).reshape(of_image).argsort(-1, kind="stable")
    place = np.empty_like(better_first)
    np.put_along_axis(place, better_first, np.arange(slots)[None, None], axis=-1)
    place = place.reshape(scores.shape)
    when = np.where(is_region, np.where(place > 0, 0, 1), 2)
    # Multiples of 2^32 / golden ratio: neighbours in this order are far apart in the group.
    turn = np.arange(scores.shape[1]) // slots * 2654435761 % 2**32
    return np.lexsort((np.broadcast_to(turn, scores.shape), -place, scores, when))


def _shrink(
    lengths: np.ndarray,
    scores: np.ndarray,
    captions: int,
    slots: int,
    rows: int,
    row_length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops regions, then cuts captions, of groups that do not fit, until each fits.

    Args: lengths and scores [F, N] of the failing groups, slots of an image (the first: its captions).
    Returns: lengths (0 where dropped), row, start, each [F, N].
    """
    groups, texts = lengths.shape
    is_caption = np.arange(texts) % slots < captions
    is_region = ~is_caption & (lengths > 0)
    dropping = _order_of_dropping(is_region, scores, slots)
    drop_rank = np.empty_like(dropping)
    np.put_along_axis(drop_rank, dropping, np.arange(texts)[None], axis=1)
    num_regions = is_region.sum(axis=1)
    # More tokens than room never fit: so many regions are dropped at once.
    left = lengths.sum(axis=1, keepdims=True) - np.cumsum(
        np.take_along_axis(np.where(is_region, lengths, 0), dropping, axis=1), axis=1
    )
    dropped = np.minimum(1 + (left > rows * row_length).sum(axis=1), num_regions)
    longest = np.where(is_caption, lengths, 0).max(
        axis=1
    )  # [F], the length that captions are cut to

    result = lengths.copy()
    row, start = np.zeros_like(lengths), np.zeros_like(lengths)
    todo = np.arange(groups)
    while todo.size:
        kept = ~is_region[todo] | (drop_rank[todo] >= dropped[todo, None])
        tried = np.where(kept, lengths[todo], 0)
        tried = np.where(is_caption, np.minimum(tried, longest[todo, None]), tried)
        row[todo], start[todo], fits = _first_fit(tried, rows, row_length)
        result[todo] = tried
        todo = todo[~fits]
        bare = dropped[todo] >= num_regions[todo]
        longest[todo[bare]] -= 1
        dropped[todo[~bare]] += 1
    return result, row, start


def _counts_up(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n of `lengths`, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
