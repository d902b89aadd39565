"""What a config leaves open: lanes, packing groups and rows."""

import dataclasses
import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import states
from grain_jax.core import errors
from grain_jax.input_pipeline import derived, packing, preparation, records, synthetic, text_lengths
from grain_jax.input_pipeline.text_lengths import TextLengths
from grain_jax.train import sharding, train_step
from tests import record_sets, tiny

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # of TFDS

OPEN = dict(input__lanes=None, text__pack_group=None, text__pack_rows=None)
CLIP_ROW = dict(model__text__context_length=77)


def open_config(**overrides):
    values = tiny.dictionary().unlock()
    values.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in (CLIP_ROW | OPEN | overrides).items()}
    )
    return config_lib.from_dict(values)


def numbers(config):
    return config.input.lanes, config.text.pack_group, config.text.pack_rows


def lengths(captions, descriptions, synthetic=None, records=None):
    """A sample of images with one web caption each."""
    captions = np.asarray(captions, np.int32).reshape(-1, 1)
    count = len(captions)
    descriptions = np.asarray(descriptions, np.int32).reshape(count, -1)
    return TextLengths(
        name="'birds'",
        records=records or count,
        captions=captions,
        synthetic=np.zeros(count, np.int32) if synthetic is None else np.asarray(synthetic),
        descriptions=descriptions,
        negatives=np.zeros((*descriptions.shape, 0), np.int32),
    )


ANYWHERE = derived.Limits()


def resolve(config, limits=ANYWHERE, samples=None, **stored):
    return derived.resolve(
        config, limits, lambda: samples or synthetic.Synthetic().text_lengths(config), **stored
    )


@pytest.mark.parametrize(
    "batch,limits,expected",
    [
        (2048, (256, 64), (64, 8)),  # 64 hosts of 4 chips
        (64, (8, 1), (4, 8)),
        (96, (1, 1), (8, 12)),
        (7, (1, 1), (1, 7)),
        (1, (1, 1), (1, 1)),
    ],
)
def test_lanes_and_group_of_any_batch(batch, limits, expected):
    config = open_config(batch_size=batch, text__pack_rows=64)
    got, line = resolve(config, derived.Limits(*limits))
    assert numbers(got)[:2] == expected
    assert line == f"input.lanes={expected[0]}, text.pack_group={expected[1]}"
    if batch % 4 == 0 and limits == (1, 1):  # the same on 2 and 4 devices and processes
        assert len({numbers(resolve(config, derived.Limits(n, n))[0]) for n in (1, 2, 4)}) == 1
    assert config_lib.from_dict(dataclasses.asdict(got)) == got  # with numbers it is a config


def test_microbatches_and_a_set_of_few_shards_are_followed():
    config = open_config(batch_size=64, microbatches=4, text__pack_rows=64)
    assert numbers(resolve(config, derived.Limits(shards={"birds": 3}))[0])[:2] == (2, 16)
    config = open_config(batch_size=64, text__pack_group=32, text__pack_rows=64)
    assert numbers(resolve(config)[0])[:2] == (2, 32)
    with pytest.raises(errors.UserError, match=r"got 3 shards in 'birds', .* need 4 lanes.*shards 4"):
        resolve(config, derived.Limits(4, 4, {"birds": 3}))
    with pytest.raises(errors.UserError, match="set --config.text.pack_group=16|: --config.text"):
        resolve(config, derived.Limits(4, 4))


def drawn(images, seed):
    rng = np.random.default_rng(seed)
    captions = rng.integers(12, 30, size=images, endpoint=True)
    descriptions = rng.integers(5, 12, size=(images, 5), endpoint=True)
    return lengths(captions, descriptions, records=10**6)


def test_rows_hold_other_images_of_the_same_kind():
    config = open_config(batch_size=2048, input__max_regions=5)
    rows = derived.rows_of(config, 16, [drawn(4096, 0)])
    texts = derived.draw(config, [drawn(16384, 1)], 16384, np.random.default_rng(99))
    scores = np.broadcast_to(-np.arange(5), texts.descriptions.shape)

    def misfits(rows):
        layout = packing.pack(texts, scores, pack_group=16, rows=rows, row_length=77)
        return layout.misfits.slots().sum() / np.count_nonzero(texts.slots())

    # Not many more rows than that takes.
    assert misfits(rows) <= derived.MISFITS < misfits(rows - max(2, rows // 10))


def draw(sample, images=64, **keys):
    """derived.draw of one set, with these keys of `input`."""
    keys = {f"input__{name}": value for name, value in keys.items()}
    config = open_config(**dict(input__max_regions=2) | keys)
    return derived.draw(config, [sample], images, np.random.default_rng(0))


def test_texts_are_chosen_as_training_chooses_them():
    sample = lengths([70, 90], [[9, 8, 7], [6, 0, 0]], synthetic=[20, 0])
    texts = draw(sample, descriptions_in_captions=1, synthetic_caption_rate=1.0)
    both = np.column_stack([texts.captions, texts.descriptions])
    # 20, a comma and 7 more; 90 and 5 more are cut.
    assert {tuple(row) for row in both.tolist()} == {(28, 9, 8), (77, 6, 0)}
    assert np.count_nonzero(texts.descriptions, axis=1).tolist().count(2) == 32  # as often
    texts = draw(sample, 4096, descriptions_in_captions=1, synthetic_caption_rate=0.25)
    assert (texts.captions == 28).mean() == pytest.approx(0.125, abs=0.02)


def test_negatives_are_drawn_as_training_has_them():
    sample = lengths([10, 10], [[9, 8, 7], [6, 0, 0]])
    negatives = np.array([[[5, 6, 7], [4, 0, 0], [77, 77, 77]], [[90, 0, 0], [0] * 3, [0] * 3]])
    sample = sample._replace(negatives=negatives.astype(np.int32))
    texts = draw(sample, negatives_per_region=2)
    rows = {tuple(map(tuple, row)) for row in texts.negatives.tolist()}
    # Two of three that follow each other, from any of them on; the third region is not kept.
    assert rows == {((77, 0), (0, 0)), *(((a, b), (4, 0)) for a, b in ((5, 6), (6, 7), (7, 5)))}
    assert draw(sample).negatives.shape == (64, 2, 0)
    config = lambda n: open_config(input__max_regions=2, input__negatives_per_region=n)
    few, many = (derived.rows_of(config(n), 8, [sample]) for n in (0, 2))
    assert few < many
    assert derived.rows_of(config(2), 8, [sample._replace(negatives=negatives[..., :0])]) == few


@pytest.mark.parametrize(
    "changes, facts",
    [
        (dict(batch_size=20), ["got 20", "config.batch_size=16 or --config.batch_size=24"]),
        (dict(batch_size=16, microbatches=4), ["microbatches: got 4", "microbatches=2"]),
        (dict(batch_size=16, text__pack_group=4), ["pack_group: got 4", "pack_group=2"]),
        (
            dict(batch_size=24, loss__group_size=2, loss__gather=3, microbatches=2),
            ["microbatches=3", "group_size=1 or --config.loss.group_size=3", "gather=4"],
        ),
    ],
)
def test_what_does_not_fit_the_mesh_is_named_with_the_flags_that_do(changes, facts):
    mesh = sharding.make_mesh(tiny.config().mesh)  # 8 devices
    with pytest.raises(errors.UserError) as caught:
        sharding.check_batch(open_config(**dict(text__pack_rows=8) | changes), mesh)
    assert all(fact in str(caught.value) for fact in facts)
    sharding.check_batch(open_config(batch_size=16, loss__group_size=8), mesh)


CAPTION, SYNTHETIC, REGION = [[9], 0, [], []], [[], 9, [], []], [[], 0, [9], [[]]]


@pytest.mark.parametrize(
    "images, keys, warning",
    [
        ([SYNTHETIC, REGION], {}, ""),
        ([REGION] * 3, {}, "no captions in 3 images .*: set --config.loss.image_caption=0$"),
        ([REGION], {"loss__image_caption": 0.0}, ""),
        ([REGION], {"input__descriptions_in_captions": 1}, ""),
        (
            [CAPTION, SYNTHETIC],
            {"input__descriptions_in_captions": 1},
            "no boxes in 2 images of 'x'; terms that need them stay 0: set --config.loss.box=0"
            " --config.loss.region_description=0$",
        ),
    ],
)
def test_a_term_without_data_names_its_key(images, keys, warning, tmp_path):
    source = dict(input__source="records", input__name="x", input__data_dir=str(tmp_path))
    (tmp_path / "x/1.0.0").mkdir(parents=True)
    (tmp_path / "x/1.0.0/dataset_info.json").touch()
    content = {"tokenizer": "clip", "records": len(images), "images": images}
    (tmp_path / "x/1.0.0" / text_lengths.FILE).write_text(json.dumps(content))
    assert re.match(
        warning and f"warning: {warning}" or "$", preparation.terms_without_data(open_config(**source | keys))
    )


def test_a_run_keeps_its_numbers_when_the_texts_of_its_set_change(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 24, size=(16, 16))
    assert record_sets.build_set(tmp_path / "in", tmp_path, "--num-shards=4") == 0
    source = dict(input__source="records", input__name="tiny_set", input__data_dir=str(tmp_path))
    config = open_config(batch_size=8, **source)
    limits = derived.Limits(8)  # one image each
    stored = lambda workdir: functools.partial(states.newest_config, workdir)
    derive = lambda workdir: preparation.derive(config, limits, records, stored(workdir))

    derived_config, line = derive(tmp_path / "run")
    assert numbers(derived_config) == (1, 1, 1)
    assert "text.pack_rows=1 from 24 images of 'tiny_set'" in line
    checkpoints = states.Checkpoints(tmp_path / "run", derived_config)
    state = train_step.TrainState(jnp.int32(1), *[{"x": jnp.zeros(2)}] * 6)
    checkpoints.save(state)
    checkpoints.close()
    path = tmp_path / "tiny_set/1.0.0" / text_lengths.FILE
    longer = json.loads(path.read_text())
    longer["images"] = [[[60], 60, [30, 30, 30], []]] * 24
    path.write_text(json.dumps(longer))
    again, line = derive(tmp_path / "run")
    assert again == derived_config and "text.pack_rows=1 as in checkpoint 1" in line
    assert numbers(derive(tmp_path / "another run")[0]) == (1, 1, 3)
