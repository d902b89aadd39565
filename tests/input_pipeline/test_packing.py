"""Packing: worked examples, and properties on random batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax.input_pipeline import packing

pytestmark = pytest.mark.quick

END = 99


def arrays(captions, descriptions, negatives=()):
    """TextArrays of lists per image: lengths of captions, of descriptions and of their negatives."""
    captions, descriptions = (np.array(x, np.int32) for x in (captions, descriptions))
    negatives = np.array(negatives, np.int32)
    return packing.TextArrays(captions, descriptions, negatives.reshape(*descriptions.shape, -1))


def tokens_of(number, length):
    """Those of a text, which tell its number (from 1) and their place in it."""
    return [*(1000 * number + np.arange(length - 1)), END]


def assert_sound(layout, lengths):
    """Every kept text stands once, whole, in bounds, apart from the others; the rest is padding."""
    texts = enumerate(np.concatenate([x[x > 0] for x in lengths]), 1)
    ids = np.array([i for number, n in texts for i in tokens_of(number, n)], np.int32)
    packed = packing.fill(layout, ids, lengths)
    groups = len(lengths.captions) // layout.pack_group
    expected = np.zeros((3, groups, layout.rows, layout.row_length), np.int32)
    taken, starts = np.zeros((2, *expected[0].shape), int)
    number = 0
    for before, now, ends in zip(lengths, layout.lengths, layout.ends):
        assert (now <= before).all() and not ends[now == 0].any()
        for slot in map(tuple, np.argwhere(before)):
            number += 1
            if length := now[slot]:
                row, end = ends[slot]
                assert length - 1 <= end < layout.row_length
                where = slot[0] // layout.pack_group, row, slice(end - length + 1, end + 1)
                taken[where] += 1
                starts[where][0] = 1
                expected[0][where] = tokens_of(number, length)
                expected[1][where] = np.arange(length)
    assert taken.max() <= 1  # 0 where every text is empty
    expected[2] = np.cumsum(starts, axis=-1) * taken
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed, expected)
    kept = layout.lengths.descriptions > 0
    assert not (layout.lengths.negatives > 0)[~kept].any()
    for misfits, before, now in zip(layout.misfits, lengths, layout.lengths):
        np.testing.assert_array_equal(misfits, now < before)
    return packed


@st.composite
def batches(draw):
    """Lengths, scores and sizes; rows are from barely enough to plenty."""
    pack_group, groups, regions, captions, negatives = (
        draw(st.integers(*b)) for b in ((1, 6), (1, 4), (0, 4), (1, 3), (0, 3))
    )
    row_length = draw(st.integers(6, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = pack_group * groups

    def lengths(*shape, share=0.7):
        real = rng.random((count, *shape)) < share
        return real * rng.integers(2, row_length + 1, real.shape, dtype=np.int32)

    descriptions = lengths(regions)
    of_negatives = lengths(regions, negatives) * (descriptions > 0)[..., None]
    texts = lengths(captions, share=1 if captions == 1 else 0.7), descriptions, of_negatives
    scores = rng.integers(0, 4, descriptions.shape).astype(np.float32)  # with ties
    least = -(-pack_group * captions // (row_length // 2))
    most = pack_group * (captions + regions * (1 + negatives))
    sizes = dict(pack_group=pack_group, rows=draw(st.integers(least, least + most)))
    return packing.TextArrays(*texts), scores, sizes | dict(row_length=row_length)


@settings(max_examples=80, deadline=None)
@given(drawn=batches())
def test_any_batch_is_packed_soundly(drawn):
    batch, scores, sizes = drawn
    assert_sound(packing.pack(batch, scores, **sizes), batch)


@pytest.mark.parametrize(
    "rows, length, captions, descriptions, negatives",
    [
        (5, 10, [[6], [4]], [[3, 4], [5, 2]], [[[3, 3], [2, 0]], [[4, 4], [2, 2]]]),
        # First the last negative of a region goes, then the lowest score, here the last one.
        (4, 10, [[6], [4]], [[3, 4], [5, 2]], [[[3, 3], [2, 0]], [[4, 0], [2, 0]]]),
        (3, 10, [[6], [4]], [[3, 4], [5, 2]], [[[3, 0], [0, 0]], [[0, 0], [0, 0]]]),
        # Then descriptions, while each image keeps one; then these too; then captions are cut.
        (2, 10, [[6], [4]], [[3, 0], [5, 0]], np.zeros((2, 2, 2))),
        (2, 7, [[6], [4]], [[3, 0], [0, 0]], np.zeros((2, 2, 2))),
        (1, 10, [[6], [4]], np.zeros((2, 2)), np.zeros((2, 2, 2))),
        (1, 8, [[4], [4]], np.zeros((2, 2)), np.zeros((2, 2, 2))),
    ],
)
def test_what_does_not_fit_goes_by_the_rule(rows, length, captions, descriptions, negatives):
    batch = arrays([[6], [4]], [[3, 4], [5, 2]], [[[3, 3], [2, 0]], [[4, 4], [2, 2]]])
    scores = np.array([[0.9, 0.5], [0.5, 0.2]])
    layout = packing.pack(batch, scores, pack_group=2, rows=rows, row_length=length)
    for got, expected in zip(layout.lengths, (captions, descriptions, negatives)):
        np.testing.assert_array_equal(got, expected)


def test_a_worked_example():
    batch = arrays([[5], [4]], [[3, 0], [2, 4]])
    layout = packing.pack(batch, np.zeros((2, 2)), pack_group=2, rows=2, row_length=9)
    assert layout.ends.captions.tolist() == [[[0, 4]], [[0, 8]]]
    assert layout.ends.descriptions.tolist() == [[[1, 6], [0, 0]], [[1, 8], [1, 3]]]
    assert not layout.misfits.slots().any()
    _, positions, segments = assert_sound(layout, batch)
    assert segments.tolist() == [[[1] * 5 + [2] * 4, [1] * 4 + [2] * 3 + [3] * 2]]
    assert positions[0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_one_text_per_row_is_the_padded_batch():
    batch = arrays([[5], [2]], [[3, 0], [0, 4]])
    layout = packing.one_text_per_row(batch, row_length=6)
    assert (layout.pack_group, layout.rows, layout.row_length) == (1, 3, 6)
    assert layout.ends.captions.tolist() == [[[0, 4]], [[0, 1]]]
    assert layout.ends.descriptions.tolist() == [[[1, 2], [0, 0]], [[0, 0], [2, 3]]]
    assert assert_sound(layout, batch)[0].tolist() == [
        [[1000, 1001, 1002, 1003, END, 0], [3000, 3001, END, 0, 0, 0], [0] * 6],
        [[2000, END, 0, 0, 0, 0], [0] * 6, [4000, 4001, 4002, END, 0, 0]],
    ]
