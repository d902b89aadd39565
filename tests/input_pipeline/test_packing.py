"""Packing: worked examples, and properties on random batches."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax.input_pipeline import packing

END = 99
Rows = collections.namedtuple("Rows", "tokens positions segments")


def make_batch(captions, descriptions, scores=None):
    """Lengths and mask of a batch from lists: a caption an image, or a list of them; a description of None is masked."""
    mask = np.array([[d is not None for d in row] for row in descriptions], dtype=bool)
    mask = mask.reshape(len(captions), -1)
    scores = np.zeros(mask.shape) if scores is None else scores
    return dict(
        caption_lengths=np.array(captions, dtype=np.int32).reshape(len(captions), -1),
        # What stands under the mask must not matter.
        description_lengths=np.array(
            [[77 if d is None else d for d in row] for row in descriptions], dtype=np.int32
        ).reshape(mask.shape),
        region_mask=mask,
        region_scores=np.array(scores, dtype=np.float32).reshape(mask.shape),
    )


def negative_lengths(batch):
    """Lengths of the negatives, [B, R, 0] where the batch has none."""
    none = np.zeros((*batch["region_mask"].shape, 0), np.int32)
    return batch.get("negative_lengths", none)


def lengths_of(batch):
    """Of captions [B, C], descriptions [B, R] and negatives [B, R, H], 0 where there is none."""
    descriptions = np.where(batch["region_mask"], batch["description_lengths"], 0)
    return batch["caption_lengths"], descriptions, negative_lengths(batch)


def tokens_of(number, length):
    """Those of a text, which tell its number (from 1) and their place in it."""
    return [*(1000 * number + np.arange(length - 1)), END]


def assert_sound(layout, batch):
    """Every kept text stands once, whole, in bounds, apart from the others; the rest is padding."""
    lengths = lengths_of(batch)
    texts = enumerate(np.concatenate([of[of > 0] for of in lengths]), 1)
    ids = np.array([i for number, n in texts for i in tokens_of(number, n)], np.int32)
    packed = Rows(*packing.fill(layout, ids, lengths))
    groups = len(lengths[0]) // layout.pack_group
    expected = Rows(*np.zeros((3, groups, layout.rows, layout.row_length), np.int32))
    taken, starts = np.zeros((2, *expected.tokens.shape), int)
    left = layout.caption_lengths, layout.description_lengths, layout.negative_lengths
    number = 0
    for before, now, at in zip(
        lengths, left, (layout.caption_at, layout.description_at, layout.negative_at)
    ):
        assert (now <= before).all() and not at[now == 0].any()
        for slot in map(tuple, np.argwhere(before)):
            number += 1
            if length := now[slot]:
                row, end = at[slot]
                assert length - 1 <= end < layout.row_length
                where = slot[0] // layout.pack_group, row, slice(end - length + 1, end + 1)
                taken[where] += 1
                starts[where][0] = 1
                expected.tokens[where] = tokens_of(number, length)
                expected.positions[where] = np.arange(length)
    assert taken.max() <= 1  # 0 where every text is empty
    expected.segments[:] = np.cumsum(starts, axis=-1) * taken
    for got, wanted in zip(packed, expected):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)
    assert not (layout.negative_mask & ~layout.region_mask[..., None]).any()
    dropped = [(now < before).sum() for before, now in zip(lengths, left)]
    assert layout.captions_cut == dropped[0] and layout.texts_dropped == sum(dropped[1:])
    return packed


@st.composite
def batches(draw):
    """A batch with its sizes; rows are from barely enough to plenty."""
    pack_group, groups, regions, captions, negatives = (
        draw(st.integers(*b)) for b in ((1, 6), (1, 4), (0, 4), (1, 3), (0, 3))
    )
    row_length = draw(st.integers(6, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = pack_group * groups
    mask = rng.random((count, regions)) < 0.7
    batch = dict(
        caption_lengths=rng.integers(2, row_length + 1, (count, captions), dtype=np.int32)
        * (rng.random((count, captions)) < (1 if captions == 1 else 0.7)),
        description_lengths=rng.integers(2, row_length + 1, mask.shape, dtype=np.int32),
        region_mask=mask,
        region_scores=rng.integers(0, 4, mask.shape).astype(np.float32),  # with ties
    )
    if negatives:
        shape = (*mask.shape, negatives)
        there = mask[..., None] & (rng.random(shape) < 0.7)
        of_negatives = rng.integers(2, row_length + 1, shape, dtype=np.int32)
        batch["negative_lengths"] = np.where(there, of_negatives, 0)
    least = -(-pack_group * captions // (row_length // 2))
    most = pack_group * (captions + regions * (1 + negatives))
    rows = draw(st.integers(least, least + most))
    return batch, dict(pack_group=pack_group, rows=rows, row_length=row_length)


def plain_first_fit(lengths, rows, row_length):
    """First-fit decreasing text by text: (row, start) of each slot, or None."""
    used, at = [0] * rows, {}
    for slot in sorted(np.flatnonzero(lengths), key=lambda s: -lengths[s]):
        row = next((r for r in range(rows) if used[r] + lengths[slot] <= row_length), None)
        if row is None:
            return None
        at[slot] = (row, used[row])
        used[row] += lengths[slot]
    return at


def plain_pack(batch, pack_group, rows, row_length):
    """The rule of `pack`, one group, one text and one drop at a time: ends and lengths."""
    result = []
    for g in range(0, len(batch["caption_lengths"]), pack_group):
        group = {name: array[g : g + pack_group] for name, array in batch.items()}
        captions, descriptions, negatives = lengths_of(group)
        of_image = negatives.reshape(len(negatives), -1)
        lengths = np.concatenate([captions, descriptions, of_image], axis=1)
        captions = group["caption_lengths"].shape[1]
        first = captions + descriptions.shape[1]
        scores = group["region_scores"]
        images = [  # the regions of each, the best first
            sorted(np.flatnonzero(row), key=lambda r: (-scores[i, r], r))
            for i, row in enumerate(descriptions)
        ]
        cap = lengths[:, :captions].max()
        while (at := plain_first_fit(lengths.ravel(), rows, row_length)) is None:
            most = max(map(len, images))
            if lengths[:, first:].any():  # the last negative of a region, then the lowest score
                i, slot = min(
                    np.argwhere(lengths[:, first:]),
                    key=lambda at: (
                        -(at[1] % negatives.shape[2]),
                        scores[at[0], at[1] // negatives.shape[2]],
                        -at[1],
                        int(at[0]) * 2654435761 % 2**32,
                    ),
                )
                lengths[i, first + slot] = 0
            elif most:  # who gives a region: the lowest score, then who has most, then in turn
                giving = [i for i, kept in enumerate(images) if len(kept) > (most > 1)]
                give = min(
                    giving,
                    key=lambda i: (
                        scores[i, images[i][-1]],
                        -len(images[i]),
                        i * 2654435761 % 2**32,
                    ),
                )
                lengths[give, captions + images[give].pop()] = 0
            else:
                cap -= 1
                lengths[:, :captions] = np.minimum(group["caption_lengths"], cap)
        ends = np.zeros((lengths.size, 2), dtype=int)
        for slot, (row, start) in at.items():
            ends[slot] = row, start + lengths.flat[slot] - 1
        result.append((lengths, ends.reshape(*lengths.shape, 2)))
    return tuple(np.concatenate(parts) for parts in zip(*result, strict=True))


@settings(max_examples=80, deadline=None)
@given(drawn=batches())
def test_any_batch_is_packed_soundly_and_by_the_rule(drawn):
    batch, sizes = drawn
    layout = packing.pack(**batch, **sizes)
    assert_sound(layout, batch)
    lengths, ends = plain_pack(batch, **sizes)
    captions = batch["caption_lengths"].shape[1]
    np.testing.assert_array_equal(layout.caption_lengths, lengths[:, :captions])
    last = captions + batch["region_mask"].shape[1]
    shape = layout.negative_mask.shape
    np.testing.assert_array_equal(layout.description_lengths, lengths[:, captions:last])
    np.testing.assert_array_equal(layout.negative_lengths, lengths[:, last:].reshape(shape))
    np.testing.assert_array_equal(layout.caption_at, ends[:, :captions])
    np.testing.assert_array_equal(layout.description_at, ends[:, captions:last])
    np.testing.assert_array_equal(layout.negative_at, ends[:, last:].reshape(*shape, 2))
    assert layout.captions_cut == (lengths[:, :captions] < batch["caption_lengths"]).sum()


def test_a_worked_example():
    batch = make_batch(captions=[5, 4], descriptions=[[3, None], [2, 4]])
    layout = packing.pack(**batch, pack_group=2, rows=2, row_length=9)
    assert layout.caption_at.tolist() == [[[0, 4]], [[0, 8]]]
    assert layout.description_at.tolist() == [[[1, 6], [0, 0]], [[1, 8], [1, 3]]]
    assert layout.texts_dropped == layout.captions_cut == 0
    packed = assert_sound(layout, batch)
    assert packed.segments.tolist() == [[[1] * 5 + [2] * 4, [1] * 4 + [2] * 3 + [3] * 2]]
    assert packed.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert (packed.segments == 0).mean() == 0.0


def test_captions_that_an_image_lacks_take_no_room():
    batch = make_batch(captions=[[5, 0, 3], [0, 2, 0], [0, 0, 0]], descriptions=[[2], [None], [4]])
    layout = packing.pack(**batch, pack_group=3, rows=3, row_length=8)
    assert layout.caption_at.tolist() == [
        [[0, 4], [0, 0], [0, 7]],
        [[0, 0], [1, 7], [0, 0]],
        [[0, 0], [0, 0], [0, 0]],
    ]
    assert layout.description_at.tolist() == [[[1, 5]], [[0, 0]], [[1, 3]]]
    packed = assert_sound(layout, batch)
    assert (packed.segments == 0).mean() == pytest.approx(1 / 3)
    del batch["region_scores"]
    layout = packing.one_text_per_row(**batch, row_length=8)
    assert layout.rows == 4 and layout.caption_at[0].tolist() == [[0, 4], [0, 0], [2, 2]]
    assert_sound(layout, batch)


def test_one_text_per_row_is_the_padded_batch():
    batch = make_batch(captions=[5, 2], descriptions=[[3, None], [None, 4]])
    del batch["region_scores"]
    layout = packing.one_text_per_row(**batch, row_length=6)
    assert (layout.pack_group, layout.rows, layout.row_length) == (1, 3, 6)
    assert layout.caption_at.tolist() == [[[0, 4]], [[0, 1]]]
    assert layout.description_at.tolist() == [[[1, 2], [0, 0]], [[0, 0], [2, 3]]]
    packed = assert_sound(layout, batch)
    assert packed.tokens.tolist() == [
        [[1000, 1001, 1002, 1003, END, 0], [3000, 3001, END, 0, 0, 0], [0] * 6],
        [[2000, END, 0, 0, 0, 0], [0] * 6, [4000, 4001, 4002, END, 0, 0]],
    ]
    assert (packed.segments == 0).mean() == pytest.approx(1 - 14 / 36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pack_group=3), "pack_group 3 does not divide the batch of 4 images"),
        (dict(pack_group=4, row_length=7), "1 rows of 7 tokens cannot hold 4 captions"),
        (dict(caption_lengths=np.array([[2], [9], [2], [2]])), "caption 0 of image 1 has 9 tokens"),
        (dict(caption_lengths=np.array([2, 2, 2, 2])), "shapes do not agree"),
        (dict(description_lengths=np.full((4, 1), 1)), "description 0 of image 2 has 1 tokens"),
        (dict(region_scores=np.full((4, 1), np.nan)), "region 0 of image 2 is nan"),
        (dict(negative_lengths=np.full((4, 1), 2)), "shapes do not agree: .*negative_lengths"),
        (
            dict(negative_lengths=np.full((4, 1, 1), 2)),
            "region 0 of image 0 has negatives, but is m",
        ),
        (
            dict(negative_lengths=np.array([0, 0, 2, 9]).reshape(4, 1, 1)),
            "negative 0 of image 3 has 9 tokens, expected 2..8",
        ),
    ],
)
def test_wrong_arguments_are_one_line(change, message):
    batch = make_batch(captions=[2, 2, 2, 2], descriptions=[[None], [None], [3], [2]])
    with pytest.raises(ValueError, match=message) as error:
        packing.pack(**(batch | dict(pack_group=2, rows=1, row_length=8) | change))
    assert "\n" not in str(error.value)


def test_fill_refuses_tokens_of_another_batch():
    batch = make_batch(captions=[3, 5], descriptions=[[4], [None]])
    layout = packing.pack(**batch, pack_group=2, rows=2, row_length=8)
    no_negatives = np.zeros((2, 1, 0), np.int32)
    lengths = batch["caption_lengths"], np.array([[4], [0]]), no_negatives
    with pytest.raises(ValueError, match=r"ids have shape \(16,\), expected \(12,\)"):
        packing.fill(layout, np.zeros(16, np.int32), lengths)
    with pytest.raises(ValueError, match=r"lengths have shapes .*\(3, 1\).*, expected"):
        packing.fill(
            layout, np.zeros(16, np.int32), (*lengths[:1], np.full((3, 1), 4), no_negatives)
        )
