"""Packs captions, region descriptions and their negatives into rows of text, for each group of images.

A caption has 10-20 tokens and a row 77: with one text per row, most of the work of the text tower is padding.
`pack` computes the place of every text; `fill` writes the tokens there. Padded texts have places, too
(`one_text_per_row`), so the model has one form of input.
Letters: B images, C captions and R regions an image, H negatives a region, G = B / pack_group groups, L = row_length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_TEXT_LENGTH = 2  # start and end token


class TextPlaces(NamedTuple):
    """The places of the texts of a batch, and the texts that did not fit.

    A place is (row within the group of the image, position of the end token), (0, 0) of a text that is not there or was
    dropped; its length is 0.

    Attributes:
      caption_at: i32[B, C, 2].
      description_at: i32[B, R, 2].
      negative_at: i32[B, R, H, 2].
      caption_lengths: i32[B, C], after a cut.
      description_lengths: i32[B, R].
      negative_lengths: i32[B, R, H].
      texts_dropped: negatives, and descriptions (with their regions), dropped because a group overflowed.
      captions_cut: captions shortened because the captions of a group alone overflowed.
      pack_group: images per group.
      rows: rows per group.
      row_length: tokens per row, L.
    """

    caption_at: np.ndarray
    description_at: np.ndarray
    negative_at: np.ndarray
    caption_lengths: np.ndarray
    description_lengths: np.ndarray
    negative_lengths: np.ndarray
    texts_dropped: int
    captions_cut: int
    pack_group: int
    rows: int
    row_length: int

    @property
    def region_mask(self) -> np.ndarray:
        """bool[B, R], regions that are real and were not dropped."""
        return self.description_lengths > 0

    @property
    def negative_mask(self) -> np.ndarray:
        """bool[B, R, H], negatives that are real and were not dropped."""
        return self.negative_lengths > 0


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
) -> TextPlaces:
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
    lengths, per_image = _checked(
        caption_lengths, description_lengths, region_mask, negative_lengths, row_length
    )
    captions, regions, negatives = per_image
    batch, slots = lengths.shape
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
    of_regions = np.where(region_mask, region_scores, 0).astype(np.float32)
    if not np.isfinite(of_regions).all():
        image, region = np.argwhere(~np.isfinite(of_regions))[0]
        raise ValueError(
            f"the score of region {region} of image {image} is {of_regions[image, region]}, expected a "
            "finite number; rebuild the records"
        )
    of_captions = np.zeros((batch, captions), np.float32)
    scores = np.concatenate(
        [of_captions, of_regions, np.repeat(of_regions, negatives, axis=1)], axis=1
    )
    in_groups = (batch // pack_group, pack_group * slots)  # [G, slots of a group]
    left, scores = lengths.reshape(in_groups).copy(), scores.reshape(in_groups)
    row, start, fits = _first_fit(left, rows, row_length)
    failing = np.flatnonzero(~fits)
    if failing.size:
        left[failing], row[failing], start[failing] = _shrink(
            left[failing], scores[failing], per_image, rows, row_length
        )
    return _places(row, start, left, lengths, per_image, pack_group, rows, row_length)


def one_text_per_row(
    *,
    caption_lengths: np.ndarray,
    description_lengths: np.ndarray,
    region_mask: np.ndarray,
    row_length: int,
    negative_lengths: np.ndarray | None = None,
) -> TextPlaces:
    """The places of padded texts: groups of one image, caption c in row c, description r in row C + r.

    Negative h of region r is in row C + R + r H + h. Rows of texts that are not there stay padding. Arguments and
    errors as in `pack`.
    """
    lengths, per_image = _checked(
        caption_lengths, description_lengths, region_mask, negative_lengths, row_length
    )
    row = np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape)
    start = np.zeros_like(lengths)
    return _places(row, start, lengths, lengths, per_image, 1, lengths.shape[1], row_length)


class _PerImage(NamedTuple):
    """Texts of an image, at most; their slots are in this order."""

    captions: int  # C
    regions: int  # R, descriptions
    negatives: int  # H, of each region

    @property
    def slots(self) -> int:
        return self.captions + self.regions * (1 + self.negatives)


def _places(row, start, left, lengths, per_image, pack_group, rows, row_length) -> TextPlaces:
    """The texts at these rows and starts: `left` are the lengths in the rows, of texts of i32[B, slots] `lengths`."""
    captions, regions, negatives = per_image
    row, start, left = (x.reshape(lengths.shape) for x in (row, start, left))
    at = np.stack([row, start + left - 1], axis=-1)
    at = np.where(left[..., None] > 0, at, 0).astype(np.int32)
    last = captions + regions
    shape = (len(lengths), regions, negatives)
    return TextPlaces(
        caption_at=at[:, :captions],
        description_at=at[:, captions:last],
        negative_at=at[:, last:].reshape(*shape, 2),
        caption_lengths=left[:, :captions].copy(),
        description_lengths=left[:, captions:last].copy(),
        negative_lengths=left[:, last:].reshape(shape).copy(),
        texts_dropped=int((left < lengths)[:, captions:].sum()),
        captions_cut=int((left < lengths)[:, :captions].sum()),
        pack_group=pack_group,
        rows=rows,
        row_length=row_length,
    )


def fill(
    places: TextPlaces, ids: np.ndarray, lengths: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes the tokens of a batch to their places; a cut caption keeps its end token.

    Args:
      places: from `pack` or `one_text_per_row`.
      ids: i32[sum of all lengths], text after text: all captions, all descriptions, all negatives, each image by image,
        those included that were dropped.
      lengths: those of captions i32[B, C], descriptions i32[B, R] and negatives i32[B, R, H] before drops and cuts, 0
        where there is none.

    Returns:
      i32[G, rows, L] each: tokens, 0 in the padding; positions within the text, 0 at its start token and in the
      padding; segments, 1, 2, ... for the texts of a row from left to right, 0 for padding.

    Raises:
      ValueError: shapes of lengths, ids and places contradict each other.
    """
    at = places.caption_at, places.description_at, places.negative_at
    left = places.caption_lengths, places.description_lengths, places.negative_lengths
    for name, got, expected in (
        ("lengths have shapes", [x.shape for x in lengths], [x.shape for x in left]),
        ("ids have shape", ids.shape, (sum(int(x.sum()) for x in lengths),)),
    ):
        if got != expected:
            raise ValueError(f"{name} {got}, expected {expected} by the places and lengths")
    # An entry for each text, in the order of `ids`; those that were dropped go.
    real = [of > 0 for of in lengths]
    image, length, source_length, end = (
        np.concatenate(parts)
        for parts in (
            [np.nonzero(mask)[0] for mask in real],
            [of[mask] for of, mask in zip(left, real)],
            [of[mask] for of, mask in zip(lengths, real)],
            [of[mask] for of, mask in zip(at, real)],
        )
    )
    source_start = np.cumsum(source_length) - source_length
    kept = length > 0
    image, length, source_length, source_start, end = (
        x[kept] for x in (image, length, source_length, source_start, end)
    )
    first_row = image // places.pack_group * places.rows  # of the group of the image
    end = (first_row + end[:, 0]) * places.row_length + end[:, 1]  # over all rows of all groups
    start = end - length + 1

    groups = len(places.caption_at) // places.pack_group
    shape = (groups, places.rows, places.row_length)
    tokens, positions, segments, starts = (np.zeros(np.prod(shape), np.int32) for _ in range(4))
    # An entry for each token.
    position = _counts_up(length)
    into = np.repeat(start, length) + position
    tokens[into] = ids[np.repeat(source_start, length) + position]
    tokens[end] = ids[source_start + source_length - 1]  # another token where a caption was cut
    positions[into] = position
    starts[start] = 1
    segments[into] = np.cumsum(starts.reshape(shape), axis=-1).reshape(-1)[into]
    return tokens.reshape(shape), positions.reshape(shape), segments.reshape(shape)


def _checked(
    caption_lengths, description_lengths, region_mask, negative_lengths, row_length
) -> tuple[np.ndarray, _PerImage]:
    """Captions, descriptions and negatives as i32[B, slots], 0 where there is none, or a ValueError."""
    captions, regions = np.asarray(caption_lengths), np.asarray(region_mask, bool)
    if negative_lengths is None:
        negative_lengths = np.zeros((*regions.shape, 0), np.int32)
    shapes = [np.shape(x) for x in (captions, description_lengths, regions, negative_lengths)]
    expected = (len(captions), *regions.shape[1:])
    if [len(x) for x in shapes] != [2, 2, 2, 3] or not (
        shapes[1] == shapes[2] == shapes[3][:2] == expected
    ):
        raise ValueError(
            "shapes do not agree: caption_lengths {}, description_lengths {}, region_mask {}, negative_lengths {};"
            " expected [B, C], [B, R], [B, R], [B, R, H]".format(*shapes)
        )
    has_negatives = (np.asarray(negative_lengths) != 0).any(axis=2)
    if (has_negatives & ~regions).any():
        image, region = np.argwhere(has_negatives & ~regions)[0]
        raise ValueError(f"region {region} of image {image} has negatives, but is masked")
    parts = {
        "caption": captions,
        "description": np.where(regions, description_lengths, 0),
        "negative": np.reshape(negative_lengths, (len(captions), -1)),
    }
    for name, lengths in parts.items():
        real = regions if name == "description" else lengths != 0
        wrong = real & ((lengths < MIN_TEXT_LENGTH) | (lengths > row_length))
        if wrong.any():
            image, number = np.argwhere(wrong)[0]
            raise ValueError(
                f"{name} {number} of image {image} has {lengths[image, number]} tokens, expected "
                f"{MIN_TEXT_LENGTH}..{row_length}; tokenize with context_length <= {row_length}"
            )
    per_image = _PerImage(captions.shape[1], regions.shape[1], shapes[3][2])
    return np.concatenate([*parts.values()], axis=1).astype(np.int32), per_image


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
    is_region: np.ndarray, is_negative: np.ndarray, scores: np.ndarray, per_image: _PerImage
) -> np.ndarray:
    """The slots [F, N] of each group in the order in which their texts are dropped; those that stay are last.

    Args: is_region and is_negative bool[F, N], scores f32[F, N].
    """
    slots = per_image.slots
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
    number[per_image.captions + per_image.regions :] = np.tile(
        np.arange(per_image.negatives), per_image.regions
    )
    number = np.broadcast_to(np.tile(number, scores.shape[1] // slots), scores.shape)
    # Multiples of 2^32 / golden ratio: neighbours in this order are far apart in the group.
    turn = np.arange(scores.shape[1]) // slots * 2654435761 % 2**32
    return np.lexsort((np.broadcast_to(turn, scores.shape), -place, scores, -number, when))


def _shrink(
    lengths: np.ndarray,
    scores: np.ndarray,
    per_image: _PerImage,
    rows: int,
    row_length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops negatives, then regions, then cuts captions, of groups that do not fit, until each fits.

    Args: lengths and scores [F, N] of the failing groups.
    Returns: lengths (0 where dropped), row, start, each [F, N].
    """
    groups, texts = lengths.shape
    slot = np.arange(texts) % per_image.slots
    is_caption = slot < per_image.captions
    can_go = ~is_caption & (lengths > 0)
    is_negative = can_go & (slot >= per_image.captions + per_image.regions)
    dropping = _order_of_dropping(can_go & ~is_negative, is_negative, scores, per_image)
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
