"""A run with LoRA: loaded, merged, and resumed with its own scale alone."""

import jax
import numpy as np
import pytest

import grain_jax
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert.__main__ import main
from grain_jax.core import low_rank
from grain_jax.models import grain
from grain_jax.train import run
from tests import tiny

pytestmark = pytest.mark.long

RUN = dict(
    optim__lora__rank=4,
    optim__lora__alpha=6.0,
    ema_decay=0.9,
    total_steps=2,
    checkpoint_every=1,
    checkpoint_keep=4,
    optim__learning_rate=0.02,
)
# Two towers compile sooner.
TWO = dict(model__decoder=None, model__image__pool="mean", input__max_regions=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    run.train(tiny.small(**RUN, **TWO), workdir)
    return workdir


def test_it_does_not_go_on_with_another_scale(finished):
    message = "optim.lora.alpha: the run has 6.0, got 8.0\n.* use another --workdir"
    with pytest.raises(files.CheckpointError, match=message):
        run.train(tiny.small(**RUN | dict(optim__lora__alpha=8.0), **TWO), finished)


def test_it_is_loaded_and_merged_as_it_was_trained(finished, tmp_path, capsys):
    stored = saved_model.load_stored(finished)
    assert len(list(low_rank.maps_in(stored.params))) == 12
    predictor = grain_jax.load(finished)
    names = grain.parameter_shapes(predictor.model)
    assert grain.flat(predictor.params).keys() == names.keys()
    base = grain.flat(stored.params)["image/blocks/mlp/in/kernel"]
    a, b = (grain.flat(stored.params)[f"image/blocks/mlp/in/lora_{x}"] for x in "ab")
    expected = base.astype(np.float64) + 1.5 * a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(
        predictor.params["image"]["blocks"]["mlp"]["in"]["kernel"], expected, rtol=1e-5, atol=1e-6
    )
    assert np.abs(1.5 * a @ b).max() > 1e-4
    batch = tiny.batch(tiny.small(**RUN, **TWO))
    apart = jax.jit(grain.GRAIN(stored.model, lora=1.5).apply)({"params": stored.params}, batch)
    folded = jax.jit(grain.GRAIN(stored.model).apply)({"params": predictor.params}, batch)
    for name in ("image_embed", "text_embed"):
        np.testing.assert_allclose(getattr(folded, name), getattr(apart, name), atol=1e-5)
    out = tmp_path / "merged"
    assert main(["average", str(finished), "--output", str(out)]) == 0
    assert "LoRA of rank 4 folded in" in capsys.readouterr().out
    for name, x in grain.flat(saved_model.load_model(out)[1]).items():
        np.testing.assert_array_equal(x, grain.flat(predictor.params)[name], err_msg=name)
