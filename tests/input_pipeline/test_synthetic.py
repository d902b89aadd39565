import itertools
import subprocess
import sys

import numpy as np

from grain_jax.input_pipeline import synthetic
from tests import record_sets
from tests.paths import ROOT


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
        joined = type(expected)(*map(np.concatenate, zip(parts[0][step], parts[1][step])))
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


def test_several_captions_have_the_lengths_of_their_kinds():
    joined, one = [], take(1)[0]
    for batch in take(20, captions=3):
        assert batch.caption_mask[:, :2].all() and not batch.texts_dropped.any()
        np.testing.assert_array_equal(batch.caption_mask[:, 2], batch.region_mask.any(axis=1))
        for i, (row, end) in enumerate(batch.caption_at[:, 2]):
            if batch.caption_mask[i, 2]:
                joined.append((batch.text_positions[i // 2, row, end], batch.region_mask[i].sum()))
    tokens, regions = np.array(joined).T  # without the start token
    assert (tokens >= 3 * regions).all() and (tokens <= 11 * regions).all()
    assert tokens.max() > 30
    np.testing.assert_array_equal(one.image, take(1, captions=3)[0].image)


def test_no_tensorflow():
    code = (
        "import sys\n"
        "from grain_jax.input_pipeline import assemble, order, packing, sources, synthetic, tokenizer\n"
        "from grain_jax.files import images\n"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax', 'torch') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
