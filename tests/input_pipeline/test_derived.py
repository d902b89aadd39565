"""What a config leaves open: lanes, packing groups and rows."""

import dataclasses
import functools
import itertools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import states
from grain_jax.core import errors
from grain_jax.input_pipeline import assemble, derived, preparation, records, sources, synthetic, tokenizer
from grain_jax.train import sharding, train_step
from tests import record_sets, tiny

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # of TFDS

OPEN = dict(input__lanes=None, text__pack_group=None, text__pack_rows=None, model__text__context_length=77)


def open_config(**overrides):
    return tiny.config(**OPEN | overrides)


def numbers(config):
    return config.input.lanes, config.text.pack_group, config.text.pack_rows


class Texts(sources.LaneSource):
    """The same texts in every image: (captions, descriptions)."""

    def __init__(self, captions, descriptions):
        self.texts = captions, descriptions

    def num_examples(self, config):
        return 10

    def lane_batch(self, config, lane, step):
        captions, descriptions = self.texts
        image = np.zeros((config.model.image.image_size,) * 2 + (3,), np.uint8)
        boxes = [(0.5, 0.5, 0.5, 0.5)] * len(descriptions)
        example = assemble.Example(image, captions, descriptions, boxes)
        images = [example] * (config.batch_size // config.input.lanes)
        return assemble.of_examples(images, config, tokenizer.of_tower(config.model.text))


ANYWHERE = derived.Limits()


def resolve(config, limits=ANYWHERE, source=None, **stored):
    return derived.resolve(config, limits, source or synthetic.Synthetic(), **stored)


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


@pytest.mark.parametrize("group, negatives, most", [(1, 0, 2.5), (16, 0, 1.3), (64, 0, 1.25), (16, 2, 1.5)])
def test_rows_lose_no_text_of_other_images_of_the_same_kind(group, negatives, most):
    keys = dict(text__pack_group=group, input__negatives_per_region=negatives)
    config, line = resolve(open_config(batch_size=64, input__lanes=1, **keys))
    texts = derived.sample(config, synthetic.Synthetic())
    assert f"text.pack_rows={config.text.pack_rows} for {texts.tokens.mean():.1f} +- " in line
    other, tokens = dataclasses.replace(config, seed=5), 0
    for batch in itertools.islice(synthetic.batches(other), 64):
        assert not batch.texts_dropped.any()
        tokens += np.count_nonzero(batch.text_segments)
    assert config.text.pack_rows <= np.ceil(most * tokens / (64 * 64 // group) / config.row_length)


def test_a_row_holds_whole_texts():
    config, line = resolve(open_config(batch_size=16, text__pack_group=16), source=Texts(["a " * 38], []))
    assert config.text.pack_rows == 16  # of 40 tokens two do not fit into 77
    assert "text.pack_rows=16 for 40.0 +- 0.0 tokens per image, in 10 images" in line
    assert not next(Texts(["a " * 38], []).batches(config)).texts_dropped.any()


@pytest.mark.parametrize(
    "changes, facts",
    [
        (dict(batch_size=20), ["got 20", "config.batch_size=16 or --config.batch_size=24"]),
        (dict(batch_size=16, microbatches=4), ["microbatches: got 4", "microbatches=2"]),
        (dict(batch_size=16, text__pack_group=4), ["pack_group: got 4", "pack_group=2"]),
        (
            dict(batch_size=24, loss__group_size=2, microbatches=2),
            ["microbatches=3", "group_size=1 or --config.loss.group_size=3"],
        ),
    ],
)
def test_what_does_not_fit_the_mesh_is_named_with_the_flags_that_do(changes, facts):
    mesh = sharding.make_mesh(tiny.config().mesh)  # 8 devices
    with pytest.raises(errors.UserError) as caught:
        sharding.check_batch(open_config(**dict(text__pack_rows=8) | changes), mesh)
    assert all(fact in str(caught.value) for fact in facts)
    sharding.check_batch(open_config(batch_size=16, loss__group_size=8), mesh)


@pytest.mark.parametrize(
    "captions, descriptions, keys, warning",
    [
        (["a"], ["b"], {}, ""),
        ([], ["b"], {}, "no captions in 10 images; terms .*: set --config.loss.image_caption=0$"),
        ([], ["b"], {"loss__image_caption": 0.0}, ""),
        (
            ["a"],
            [],
            {},
            "no boxes in 10 images; terms that need them stay 0: set --config.loss.box=0"
            " --config.loss.region_description=0$",
        ),
    ],
)
def test_a_term_without_data_names_its_key(captions, descriptions, keys, warning):
    _, line = resolve(open_config(batch_size=8, **keys), source=Texts(captions, descriptions))
    assert re.fullmatch(warning and f"warning: {warning}", "\n".join(line.splitlines()[1:]))


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
    assert "text.pack_rows=1 for " in line
    checkpoints = states.Checkpoints(tmp_path / "run", derived_config)
    state = train_step.TrainState(jnp.int32(1), *[{"x": jnp.zeros(2)}] * 6)
    checkpoints.save(state)
    checkpoints.close()
    lines = [json.loads(line) for line in (tmp_path / "in/A.jsonl").read_text().splitlines()]
    longer = (json.dumps(line | {"caption": "long " * 60}) + "\n" for line in lines)
    (tmp_path / "in/A.jsonl").write_text("".join(longer))
    assert record_sets.build_set(tmp_path / "in", tmp_path, "--num-shards=4", "--overwrite") == 0
    again, line = derive(tmp_path / "run")
    assert again == derived_config and "text.pack_rows=1 as in checkpoint 1" in line
    assert derive(tmp_path / "another run")[0].text.pack_rows > 1
