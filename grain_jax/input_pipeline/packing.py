"""Packs captions, region descriptions and their negatives into rows of text, for each group of images.

A caption has 10-20 tokens and a row 77: with one text per row, most of the work of the text tower is padding.
`pack` computes a Layout, the place of every text; `fill` writes the tokens there. Padded texts have a layout, too
(`one_text_per_row`), so the model has one form of input.
Letters: B images, C captions and R regions an image, H negatives a region, G = B / pack_group groups, L = row_length.
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
      texts_dropped: negatives, and descriptions (with their regions), dropped because a group overflowed.
      captions_cut: captions shortened because the captions of a group alone overflowed.
      pack_group: images per group.
      rows: rows per group.
      row_length: tokens per row, L.
      negative_at: i32[B, R, H, 2], the same for negatives; (0, 0) where masked.
      negative_mask: bool[B, R, H], negatives that are real and were not dropped.
      negative_lengths: i32[B, R, H], 0 where masked.
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
    negative_at: np.ndarray
    negative_mask: np.ndarray
    negative_lengths: np.ndarray


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
    negative_lengths: np.ndarray | None = None,
) -> Layout:
    """Packs the texts of `pack_group` consecutive images into `rows` rows, first-fit decreasing.

    The layout of a group depends on that group alone. While a group overflows, a text is dropped and the group is
    packed again. Negatives go first: every region loses its last one, the lowest scores first, before any loses the
    one before. Then the region of the lowest score goes; the best region of an image is dropped only where every image
    of the group has one region left. Among equal scores each image loses its last such region before any image loses a
    second. If the captions alone overflow, the longest are cut to the largest common length that fits.

    Args:
      caption_lengths: i32[B, C], tokens with specials, 2..row_length; 0 where there is no caption.
      description_lengths: i32[B, R], the same; ignored where masked.
      region_mask: bool[B, R], True where a region is real.
      region_scores: f32[B, R], finite; ignored where masked.
      pack_group: images per group; divides B.
      rows: rows per group; at least enough for two tokens of every caption.
      row_length: tokens per row.
      negative_lengths: i32[B, R, H], 0 where there is none and where the region is masked; None: H = 0.

    Raises:
      ValueError: an argument is outside these bounds.
    """
    region_mask = np.asarray(region_mask, dtype=bool)
    lengths = _text_lengths(
        caption_lengths, description_lengths, region_mask, negative_lengths, row_length
    )
    batch, slots = lengths.shape  # the captions come first, then the descriptions
    slots_of = _slots_of(caption_lengths, region_mask, negative_lengths)
    captions, regions, negatives = slots_of
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
    of_regions = np.where(region_mask, region_scores, 0)
    scores[:, captions : captions + regions] = of_regions
    scores[:, captions + regions :] = np.repeat(of_regions, negatives, axis=1)
    if not np.isfinite(scores).all():
        image, slot = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"the score of region {slot - captions} of image {image} is {scores[image, slot]}, expected a "
            "finite number; rebuild the records"
        )
    texts = np.count_nonzero(lengths[:, captions:])
    lengths = lengths.reshape(batch // pack_group, pack_group * slots)  # [G, group's slots]
    row, start, fits = _first_fit(lengths, rows, row_length)
    failing = np.flatnonzero(~fits)
    if failing.size:
        lengths[failing], row[failing], start[failing] = _shrink(
            lengths[failing],
            scores.reshape(lengths.shape)[failing],
            slots_of,
            rows,
            row_length,
        )
    of_image = (batch, slots)
    return _layout(
        row.reshape(of_image),
        start.reshape(of_image),
        lengths.reshape(of_image),
        caption_lengths=np.asarray(caption_lengths),
        slots_of=slots_of,
        texts=texts,
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
    negative_lengths: np.ndarray | None = None,
) -> Layout:
    """The layout of padded texts: groups of one image, caption c in row c, description r in row C + r.

    Negative h of region r is in row C + R + r H + h. Rows of texts that are not there stay padding. Arguments and
    errors as in `pack`.
    """
    region_mask = np.asarray(region_mask, dtype=bool)
    lengths = _text_lengths(
        caption_lengths, description_lengths, region_mask, negative_lengths, row_length
    )
    return _layout(
        np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape),
        np.zeros_like(lengths),
        lengths,
        caption_lengths=np.asarray(caption_lengths),
        slots_of=_slots_of(caption_lengths, region_mask, negative_lengths),
        texts=np.count_nonzero(lengths[:, np.shape(caption_lengths)[1] :]),
        pack_group=1,
        rows=lengths.shape[1],
        row_length=row_length,
    )


class _Slots(NamedTuple):
    """Texts of an image, at most; they stand in this order."""

    captions: int  # C
    regions: int  # R, descriptions
    negatives: int  # H, of each region


def _slots_of(caption_lengths, region_mask, negative_lengths) -> _Slots:
    negatives = 0 if negative_lengths is None else np.shape(negative_lengths)[2]
    return _Slots(np.shape(caption_lengths)[1], region_mask.shape[1], negatives)


def _layout(row, start, lengths, *, caption_lengths, slots_of, texts, **sizes: int) -> Layout:
    """The layout of texts at these rows and starts, i32[B, C + R + R H] each, of lengths that are 0 where there is none.

    `texts`: descriptions and negatives before any was dropped.
    """
    captions, regions, negatives = slots_of
    at = np.stack([row, start + lengths - 1], axis=-1)  # [B, C + R + R H, 2]
    at = np.where(lengths[..., None] > 0, at, 0).astype(np.int32)
    last = captions + regions
    of_negatives = lengths[:, last:].reshape(len(lengths), regions, negatives)
    return Layout(
        caption_at=at[:, :captions],
        description_at=at[:, captions:last],
        region_mask=lengths[:, captions:last] > 0,
        caption_lengths=lengths[:, :captions].copy(),
        description_lengths=lengths[:, captions:last].copy(),
        texts_dropped=texts - np.count_nonzero(lengths[:, captions:]),
        captions_cut=int((lengths[:, :captions] < caption_lengths).sum()),
        negative_at=at[:, last:].reshape(*of_negatives.shape, 2),
        negative_mask=of_negatives > 0,
        negative_lengths=of_negatives.copy(),
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
    negative_ids: np.ndarray | None = None,
    negative_lengths: np.ndarray | None = None,
    negative_mask: np.ndarray | None = None,
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
      negative_ids, negative_lengths, negative_mask: the same for the real negatives, bool[B, R, H]; None: H = 0.

    Raises:
      ValueError: the shapes of lengths, ids and mask contradict each other.
    """
    region_mask = np.asarray(region_mask, dtype=bool)
    caption_lengths = np.asarray(caption_lengths)
    if negative_mask is None:
        negative_mask = np.zeros(layout.negative_mask.shape, bool)
    nothing = np.zeros(0, np.int32)
    negative_ids = nothing if negative_ids is None else negative_ids
    negative_lengths = nothing if negative_lengths is None else negative_lengths
    batch = layout.caption_at.shape[0]
    for name, got, expected in (
        ("region_mask", region_mask.shape, layout.region_mask.shape),
        ("caption_lengths", caption_lengths.shape, layout.caption_lengths.shape),
        ("caption_ids", np.shape(caption_ids), (int(np.sum(caption_lengths)),)),
        ("description_lengths", np.shape(description_lengths), (int(region_mask.sum()),)),
        ("description_ids", np.shape(description_ids), (int(np.sum(description_lengths)),)),
        ("negative_mask", negative_mask.shape, layout.negative_mask.shape),
        ("negative_lengths", np.shape(negative_lengths), (int(negative_mask.sum()),)),
        ("negative_ids", np.shape(negative_ids), (int(np.sum(negative_lengths)),)),
    ):
        if got != expected:
            raise ValueError(f"{name} has shape {got}, expected {expected} by the layout and mask")
    # One entry per kept text: its start and length in the source, its length in the rows, and its end there
    # (counted over all rows of all groups).
    is_caption = caption_lengths > 0
    placed = is_caption, layout.region_mask, layout.negative_mask  # the texts that have a place
    chosen = np.concatenate(
        [
            np.ones(is_caption.sum(), dtype=bool),
            layout.region_mask[region_mask],
            layout.negative_mask[negative_mask],
        ]
    )
    source_length = np.concatenate(
        [caption_lengths[is_caption], description_lengths, negative_lengths]
    )
    source_start = (np.cumsum(source_length) - source_length)[chosen]
    source_end = source_start + source_length[chosen] - 1
    lengths = layout.caption_lengths, layout.description_lengths, layout.negative_lengths
    length = np.concatenate([of[mask] for of, mask in zip(lengths, placed)])
    first_row = np.arange(batch) // layout.pack_group * layout.rows  # of the group of the image
    image = np.concatenate([np.nonzero(mask)[0] for mask in placed])
    places = layout.caption_at, layout.description_at, layout.negative_at
    at = np.concatenate([of[mask] for of, mask in zip(places, placed)])
    end = (first_row[image] + at[:, 0]) * layout.row_length + at[:, 1]
    start = end - length + 1

    shape = (batch // layout.pack_group, layout.rows, layout.row_length)
    tokens, positions, segments, starts = (np.zeros(np.prod(shape), np.int32) for _ in range(4))
    # One entry per token.
    position = _counts_up(length)
    into = np.repeat(start, length) + position
    source = np.concatenate([caption_ids, description_ids, negative_ids])
    tokens[into] = source[np.repeat(source_start, length) + position]
    tokens[end] = source[source_end]  # changes something only where a caption was cut
    positions[into] = position
    starts[start] = 1
    segments[into] = np.cumsum(starts.reshape(shape), axis=-1).reshape(-1)[into]
    return PackedText(*(x.reshape(shape) for x in (tokens, positions, segments)))


def padding_share(segments: np.ndarray) -> float:
    """The share of tokens in [0, 1] that are padding (segment 0), of any batch of rows."""
    return float(np.mean(np.asarray(segments) == 0))


def _text_lengths(
    caption_lengths, description_lengths, region_mask, negative_lengths, row_length
) -> np.ndarray:
    """Captions, descriptions and negatives as i32[B, C + R + R H], 0 where there is none, or a ValueError."""
    caption_lengths = np.asarray(caption_lengths)
    description_lengths = np.asarray(description_lengths)
    if negative_lengths is None:
        negative_lengths = np.zeros((*region_mask.shape, 0), np.int32)
    negative_lengths = np.asarray(negative_lengths)
    expected = (*caption_lengths.shape[:1], *region_mask.shape[1:])
    if caption_lengths.ndim != 2 or not region_mask.shape == description_lengths.shape == expected:
        raise ValueError(
            f"shapes do not agree: caption_lengths {caption_lengths.shape}, description_lengths "
            f"{description_lengths.shape}, region_mask {region_mask.shape}; expected [B, C], [B, R], "
            "[B, R]"
        )
    if negative_lengths.ndim != 3 or negative_lengths.shape[:2] != region_mask.shape:
        raise ValueError(
            f"shapes do not agree: negative_lengths {negative_lengths.shape}, region_mask {region_mask.shape};"
            " expected [B, R, H], [B, R]"
        )
    if (negative_lengths != 0)[~region_mask].any():
        image, region = np.argwhere((negative_lengths != 0).any(axis=2) & ~region_mask)[0]
        raise ValueError(f"region {region} of image {image} has negatives, but is masked")
    of_image = negative_lengths.reshape(len(negative_lengths), -1)
    lengths = np.concatenate(
        [caption_lengths, np.where(region_mask, description_lengths, 0), of_image], axis=1
    ).astype(np.int32)
    captions = caption_lengths.shape[1]
    real = np.concatenate([caption_lengths != 0, region_mask, of_image != 0], axis=1)
    wrong = real & ((lengths < MIN_TEXT_LENGTH) | (lengths > row_length))
    if wrong.any():
        image, slot = np.argwhere(wrong)[0]
        which = f"caption {slot}" if slot < captions else f"description {slot - captions}"
        if slot >= captions + region_mask.shape[1]:
            which = f"negative {slot - captions - region_mask.shape[1]}"
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


def _order_of_dropping(
    is_region: np.ndarray, is_negative: np.ndarray, scores: np.ndarray, slots_of: _Slots
) -> np.ndarray:
    """The slots [F, N] of each group in the order in which their texts are dropped; those that stay are last.

    Args: is_region and is_negative bool[F, N], scores f32[F, N].
    """
    slots = _number(slots_of)
    of_image = (len(scores), -1, slots)
    # The rank of a region in its image, 0 for the best; of equal scores the earlier region is better.
    better_first = np.where(is_region, -scores, np.inf).reshape(of_image).argsort(-1, kind="stable")
    place = np.empty_like(better_first)
    np.put_along_axis(place, better_first, np.arange(slots)[None, None], axis=-1)
    place = place.reshape(scores.shape)
    when = np.where(is_region, np.where(place > 0, 0, 1), 2)
    when[is_negative] = -1
    # Which negative of its region it is, and 0 of other texts.
    number = np.zeros(slots, int)
    number[slots_of.captions + slots_of.regions :] = np.tile(
        np.arange(slots_of.negatives), slots_of.regions
    )
    number = np.broadcast_to(np.tile(number, scores.shape[1] // slots), scores.shape)
    # Multiples of 2^32 / golden ratio: neighbours in this order are far apart in the group.
    turn = np.arange(scores.shape[1]) // slots * 2654435761 % 2**32
    return np.lexsort((np.broadcast_to(turn, scores.shape), -place, scores, -number, when))


def _number(slots_of: _Slots) -> int:
    """Slots of an image."""
    return slots_of.captions + slots_of.regions * (1 + slots_of.negatives)


def _shrink(
    lengths: np.ndarray,
    scores: np.ndarray,
    slots_of: _Slots,
    rows: int,
    row_length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops negatives, then regions, then cuts captions, of groups that do not fit, until each fits.

    Args: lengths and scores [F, N] of the failing groups.
    Returns: lengths (0 where dropped), row, start, each [F, N].
    """
    groups, texts = lengths.shape
    slot = np.arange(texts) % _number(slots_of)
    is_caption = slot < slots_of.captions
    can_go = ~is_caption & (lengths > 0)
    is_negative = can_go & (slot >= slots_of.captions + slots_of.regions)
    dropping = _order_of_dropping(can_go & ~is_negative, is_negative, scores, slots_of)
    drop_rank = np.empty_like(dropping)
    np.put_along_axis(drop_rank, dropping, np.arange(texts)[None], axis=1)
    most = can_go.sum(axis=1)
    # More tokens than room never fit: so many texts are dropped at once.
    left = lengths.sum(axis=1, keepdims=True) - np.cumsum(
        np.take_along_axis(np.where(can_go, lengths, 0), dropping, axis=1), axis=1
    )
    dropped = np.minimum(1 + (left > rows * row_length).sum(axis=1), most)
    longest = np.where(is_caption, lengths, 0).max(
        axis=1
    )  # [F], the length that captions are cut to

    result = lengths.copy()
    row, start = np.zeros_like(lengths), np.zeros_like(lengths)
    todo = np.arange(groups)
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
