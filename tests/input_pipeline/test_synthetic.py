import itertools

import numpy as np

from grain_jax.input_pipeline import synthetic
from tests import record_sets


def take(count, *, seed=0, captions=1, **arguments):
    config = record_sets.config(
        "", source="synthetic", seed=seed, captions_per_image=captions, pack_rows=8
    )
    return list(itertools.islice(synthetic.batches(config, **arguments), count))


def test_batches_are_a_function_of_seed_and_step():
    whole = take(4)
    for got, expected in zip(take(2, start_step=2), whole[2:], strict=True):
        record_sets.assert_batches_equal(got, expected)
    parts = [take(4, lanes=lanes) for lanes in ((0, 1), (2, 3))]
    for step, expected in enumerate(whole):
        joined = record_sets.join([part[step] for part in parts])
        record_sets.assert_batches_equal(joined, expected)
    assert (whole[0].image != whole[1].image).any()
    assert (take(1, seed=1)[0].image != whole[0].image).any()


def test_batches_are_well_formed():
    text = record_sets.config("").model.text
    captions, regions = [], []
    for batch in take(20):
        assert batch.image.dtype == np.uint8 and batch.image.shape == (8, 16, 16, 3)
        for i in range(8):
            group, ((row, end),) = i // 2, batch.caption_at[i]
            assert batch.text_tokens[group, row, end] == text.vocab_size - 1
            captions.append(batch.text_positions[group, row, end] + 1)
        cxcywh = batch.region_boxes_cxcywh[batch.region_mask]
        assert (cxcywh[:, :2] - cxcywh[:, 2:] / 2 > -1e-6).all()
        assert (cxcywh[:, :2] + cxcywh[:, 2:] / 2 < 1 + 1e-6).all()
        regions += batch.region_mask.sum(axis=1).tolist()
    assert min(captions) >= 10 and max(captions) <= 20
    assert set(regions) <= set(range(6)) and {0, 5} <= set(regions)


def test_negatives_are_of_real_regions_and_change_nothing_else():
    def batches(number):
        config = record_sets.config(
            "", source="synthetic", negatives_per_region=number, pack_rows=12
        )
        return list(itertools.islice(synthetic.batches(config), 5)), config

    (with_negatives, config), (without, _) = batches(3), batches(0)
    counts = []
    for batch, other in zip(with_negatives, without, strict=True):
        assert batch.negative_at.shape == (8, 5, 3, 2) and not batch.texts_dropped.any()
        assert not batch.negative_mask[~batch.region_mask].any()
        assert not batch.negative_at[~batch.negative_mask].any()
        counts += batch.negative_mask.sum(axis=2)[batch.region_mask].tolist()
        assert other.negative_at is None and other.negative_mask is None
        for name in ("image", "caption_id", "description_id", "region_boxes_cxcywh"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))
        for image, region, number in np.argwhere(batch.negative_mask):
            row, end = batch.negative_at[image, region, number]
            assert batch.text_tokens[image // 2, row, end] == config.model.text.vocab_size - 1
            assert 4 <= batch.text_positions[image // 2, row, end] + 1 <= 12
    assert set(counts) == {0, 1, 2, 3}
    (lengths,) = synthetic.Synthetic().text_lengths(config)
    assert lengths.negatives.shape == (len(lengths.synthetic), 5, 3)
    assert not lengths.negatives[lengths.descriptions == 0].any()


def test_several_captions_have_the_lengths_of_their_kinds():
    joined, plain = [], take(1)[0]
    for batch in take(20, captions=3):
        assert batch.caption_mask[:, :2].all() and not batch.texts_dropped.any()
        np.testing.assert_array_equal(batch.caption_mask[:, 2], batch.region_mask.any(axis=1))
        for i, (row, end) in enumerate(batch.caption_at[:, 2]):
            if batch.caption_mask[i, 2]:
                joined.append((batch.text_positions[i // 2, row, end], batch.region_mask[i].sum()))
    tokens, regions = np.array(joined).T  # without the start token
    assert (tokens >= 3 * regions).all() and (tokens <= 11 * regions).all()
    assert tokens.max() > 30
    np.testing.assert_array_equal(plain.image, take(1, captions=3)[0].image)
