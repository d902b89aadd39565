import dataclasses

import numpy as np
import pytest

from grain_jax.input_pipeline import assemble, tokenizer
from grain_jax.train import forward
from tests import record_sets, tiny

pytestmark = pytest.mark.quick

CLIP, IMAGE = tokenizer.ClipTokenizer(), np.zeros((16, 16, 3), np.uint8)


def test_dropped_regions_and_cut_captions_are_counted_by_group():
    config = record_sets.config("", batch_size=4, lanes=1, pack_rows=1)
    text = dataclasses.replace(config.model.text, context_length=12)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    column = lambda *texts: np.array(texts, object)[:, None]
    # In tokens: captions 10 + 10 of 12 (both cut, the region goes), then 3 + 3, and of 3 + 4 one goes.
    columns = dict(
        image=np.zeros((4, 16, 16, 3), np.uint8),
        captions=column("a " * 8, "a " * 8, "a", "a"),
        caption_mask=np.ones((4, 1), bool),
        descriptions=column("b", "", "b", "b b"),
        region_boxes_cxcywh=np.full((4, 1, 4), 0.5, np.float32),
        region_mask=np.array([[True], [False], [True], [True]]),
        region_scores=np.array([[0.5], [0], [0.9], [0.1]], np.float32),
        negatives=np.zeros((4, 1, 0), object),
        negative_mask=np.zeros((4, 1, 0), bool),
    )
    batch = assemble.of_columns(columns, CLIP, config=config)
    assert batch.region_mask.tolist() == [[False], [False], [True], [False]]
    assert batch.texts_dropped.tolist() == [3, 1]
    assert batch.text_counts.tolist() == [[3, 0], [4, 0]]


def test_negatives_of_an_example():
    config = record_sets.config("", batch_size=2, lanes=1, pack_rows=1, negatives_per_region=2)
    box = [0.5] * 4
    negatives = [["b b", "A &amp; a"], ["c"]]  # the tokenizer takes the second for the description
    examples = [
        assemble.Example(IMAGE, "x", ["a & a", "b"], [box, box], negatives),
        assemble.Example(IMAGE, "x", ["b"], [box]),
    ]
    batch = assemble.of_examples(examples, config, CLIP)
    assert batch.negative_mask.shape == (2, 5, 2)
    assert np.argwhere(batch.negative_mask).tolist() == [[0, 0, 0], [0, 1, 0]]
    for text, (row, end) in zip(("b b", "c"), batch.negative_at[batch.negative_mask], strict=True):
        ids = CLIP.encode([text], 77).ids.tolist()
        assert batch.text_tokens[0, row, end + 1 - len(ids) : end + 1].tolist() == ids
    assert batch.text_counts.tolist() == [[7, 0]] and batch.texts_dropped.tolist() == [0]

    for change in (dict(negatives=[["a"] * 3, []]), dict(descriptions=["a"] * 6), dict(image=IMAGE[:8])):
        with pytest.raises(ValueError):
            assemble.of_examples([examples[0]._replace(**change), examples[1]], config, CLIP)


@pytest.mark.parametrize("packing, shape", [(False, (2, 2, 8)), (True, (1, 2, 77))])
def test_texts_of_a_run_may_be_shorter_than_the_towers(packing, shape):
    """CLIPA's: cut, with their end token; rows of one text are as short."""
    keys = dict(batch_size=2, input__lanes=1, input__max_regions=1, input__text_length=8, text__pack_rows=2)
    config = tiny.config(**keys, text__packing=packing, model__text__context_length=77)
    examples = [assemble.Example(IMAGE, "a " * n, ["b " * n], [[0.5] * 4]) for n in (3, 20)]
    batch = assemble.of_examples(examples, config, CLIP)
    assert batch.text_tokens.shape == shape == forward.abstract_batch(config).text_tokens.shape
    assert batch.text_positions.max() == 7 and (batch.text_tokens == 49407).sum() == 4
    assert batch.caption_at[:, 0, 1].tolist() == ([20, 7] if packing else [4, 7])
    assert batch.text_counts[:, 1].tolist() == ([2] if packing else [0, 2])
