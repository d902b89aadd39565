"""examples/data_source: an online source of a user through the real trainer."""

import itertools
import json
import shutil
import sys

import numpy as np

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import named
from grain_jax.input_pipeline import derived, preparation, sources
from grain_jax.train import run
from tests import record_sets, runs, tiny

SOURCE = "examples.data_source.shapes:Shapes"


def config(**overrides):
    c = tiny.dictionary(total_steps=2, checkpoint_every=1, input__source=SOURCE, **tiny.SHALLOW, **overrides)
    c.input.options = dict(colours=("red", "blue"))
    with named.importing():
        return config_lib.from_dict(c)


def test_a_batch_is_a_function_of_seed_lane_and_step():
    c = config()
    source = sources.open_source(c)
    whole = list(itertools.islice(source.batches(c), 3))
    record_sets.assert_batches_equal(next(source.batches(c, start_step=2)), whole[2])
    parts = [next(source.batches(c, lanes=lanes, start_step=2)) for lanes in ((0, 1), (2, 3))]
    record_sets.assert_batches_equal(record_sets.join(parts), whole[2])
    assert whole[2].texts_dropped.sum() == 0


def test_it_trains_with_derived_rows_and_resumes_to_the_bit(tmp_path, monkeypatch, one_device):
    plain = config(text__pack_group=None, text__pack_rows=None)
    stored, source = lambda: (None, ""), sources.open_source(plain)
    filled, _ = preparation.derive(plain, derived.Limits(), source, stored)
    assert filled.text.pack_group == 4 and 1 <= filled.text.pack_rows <= 16

    run.train(config(), tmp_path / "whole")
    stored = json.loads((tmp_path / "whole/config.json").read_text())
    assert stored["input"]["options"] == {"colours": ["red", "blue"], "examples": 4096}
    whole = runs.lines(tmp_path / "whole")
    assert len(whole) == 2 and all(np.isfinite(line["loss"]) for line in whole)
    # A run that is cut off after the checkpoint of step 1 goes on to the bit.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/2")
    run.train(config(), tmp_path / "cut")
    assert runs.lines(tmp_path / "cut") == whole

    # The model is there for those who do not have the source.
    model = config().model
    monkeypatch.delitem(sys.modules, "examples.data_source.shapes")
    assert inference.load(tmp_path / "cut").model == model
    assert "examples.data_source.shapes" not in sys.modules
