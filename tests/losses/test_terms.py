"""The table of the loss terms, and terms from outside: what they may be and what faults say."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config, losses
from grain_jax.core import errors
from grain_jax.losses import shard, total
from grain_jax.train import sharding
from tests import tiny
from tests.losses.test_losses import random_outputs
from tests.paths import ROOT


@dataclasses.dataclass(frozen=True)
class Variance:
    """Minus the variance of the image embeddings over the whole batch, on whatever devices they lie."""

    floor: float = 0.0
    names: tuple[str, ...] = ()

    def __call__(self, shard: losses.Shard) -> losses.Mean:
        x, axes = shard.outputs.image_embed, shard.layout.everywhere
        over_all = functools.partial(jax.lax.psum, axis_name=axes) if axes else lambda x: x
        images = over_all(jnp.float32(len(x)))
        mean = over_all(x.sum(0)) / images
        return losses.Mean(-((x - mean) ** 2).sum() + self.floor * len(x), jnp.float32(len(x)))


def distance(shard: losses.Shard, *, power: int) -> losses.GroupMean:
    """A mean over groups: of |caption - image|^power."""
    distances = jnp.linalg.norm(shard.outputs.image_embed - shard.outputs.text_embed[:, 0], axis=-1)
    per_group = shard.layout.per_group(distances**power)
    return losses.GroupMean(per_group.sum(1), jnp.full(len(per_group), per_group.shape[1]))


def a_number(shard: losses.Shard) -> jax.Array:
    return shard.outputs.image_embed.sum()


def of_images(shard: losses.Shard) -> losses.Mean:
    return losses.Mean(shard.outputs.image_embed.sum(-1), jnp.float32(1))


def of_wrong_groups(shard: losses.Shard) -> losses.GroupMean:
    return losses.GroupMean(jnp.zeros(3), jnp.zeros(3))


def not_keyword(shard: losses.Shard, power: int = 1) -> losses.Mean:
    return losses.Mean(jnp.float32(power), jnp.float32(1))


def _mine(name, **options):
    return {"mine": {"term": f"{__name__}:{name}", "weight": 1.0, **options}}


@pytest.mark.parametrize("devices,group_size", [(1, 4), (8, 4), (8, 1)])
def test_terms_over_the_batch_and_over_groups(devices, group_size):
    c = tiny.config(loss__group_size=group_size)
    batch, outputs = tiny.batch(c), random_outputs(c)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
    other = {"term": f"{__name__}:distance", "weight": -1.0, "power": 3}
    terms = _mine("Variance", weight=2.0, floor=0.5) | {"other": other}
    loss = dataclasses.replace(c.loss, terms=terms)
    run = functools.partial(losses.total_loss, mesh=mesh, batch_axes=sharding.BATCH_AXES)
    values = jax.jit(lambda o, b: run(o, b, loss))(outputs, batch)
    x, y = (np.asarray(v, np.float64) for v in (outputs.image_embed, outputs.text_embed[:, 0]))
    variance = 0.5 - ((x - x.mean(0)) ** 2).sum(-1).mean()
    distances = (np.linalg.norm(x - y, axis=-1) ** 3).mean()  # groups are of one size
    np.testing.assert_allclose(values.terms["mine"], variance, rtol=1e-5)
    np.testing.assert_allclose(values.terms["other"], distances, rtol=1e-5)
    plain = sum(values.terms[name] for name in losses.TERMS if name in values.terms)
    np.testing.assert_allclose(values.total, plain + 2 * variance - distances, rtol=1e-5)


@pytest.mark.parametrize(
    "entries,fault",
    [
        (_mine("nothing"), "tests.losses.test_terms has no 'nothing', expected one of: Variance,"),
        (_mine("Variance", flor=1.0), "mine.flor: no such key; did you mean loss.terms.mine.floor?"),
        (_mine("distance"), "loss.terms.mine.power: missing; it has no default"),
        (_mine("not_keyword"), "it has the parameter power: int = 1, expected (shard, *, option: type"),
        (_mine("ROOT"), "expected a function of a losses.Shard, a frozen dataclass"),
        ({"box": {"term": "a:b", "weight": 1.0}}, "loss.terms.box: expected a name of letters"),
        ({"x": {"term": "a:b", "weight": "1"}}, "loss.terms.x.weight: got '1', expected a finite"),
        ({"x": 1.0}, "loss.terms.x: got 1.0, expected a group of keys"),
    ],
)
def test_a_term_that_cannot_be_built_is_one_line(entries, fault):
    """The config says so when it is read; of a term of a right form, the losses do too."""
    keys = tiny.dictionary().to_dict()
    keys["loss"]["terms"] = entries
    with pytest.raises(config.ConfigError) as error:
        config.from_dict(keys)
    assert fault in str(error.value)
    if "mine" in entries:
        with pytest.raises(errors.UserError) as again:
            losses.terms_of(dataclasses.replace(tiny.config().loss, terms=entries))
        assert fault in str(again.value) and "\n" not in str(again.value)
        assert str(again.value).startswith("loss.terms.mine")


def test_an_unknown_name_lists_the_terms_of_the_package():
    loss = dataclasses.replace(tiny.config().loss, terms={"a": {"term": "boxx", "weight": 1.0}})
    with pytest.raises(errors.UserError, match="did you mean box. expected one of: box, box_desc"):
        losses.terms_of(loss)


@pytest.mark.parametrize(
    "name,fault",
    [
        ("a_number", "its loss is a .*, expected losses.Mean"),
        ("of_images", r"its loss have shapes \(16,\) and \(\), expected \(\) for both: a Mean"),
        ("of_wrong_groups", r"\(3,\) and \(3,\), expected \(1,\) .* of 1 groups per device"),
    ],
)
def test_what_a_term_returns_is_checked(name, fault):
    c = tiny.config()
    loss = dataclasses.replace(c.loss, terms=_mine(name))
    with pytest.raises(errors.UserError, match=f"loss term 'mine': .*{fault}"):
        jax.eval_shape(lambda o, b: losses.total_loss(o, b, loss), random_outputs(c), tiny.batch(c))


def test_a_config_with_a_term_reads_back_the_same():
    term = {"term": f"{__name__}:Variance", "weight": 1.0, "names": ("a", "b")}
    c = tiny.config(loss__terms__mine=term)
    assert config.without_defaults(c)["loss.terms.mine.names"] == ("a", "b")
    assert config.from_dict(json.loads(config.to_json(c))) == c


def test_charts_have_the_terms_in_the_order_of_the_table():
    names = ["loss_x", "loss", "loss_region_description", "loss_box", "matched_iou"]
    assert list(losses.labels_of(names).items()) == [
        ("loss", "total"),
        ("loss_box", "boxes"),
        ("loss_region_description", "region to description"),
        ("loss_x", "loss_x"),
    ]


def test_the_documents_have_every_term():
    text = (ROOT / "docs/diagnostics.md").read_text()
    assert all(f"`{term.metric}`" in text for term in losses.TERMS.values())
    keys = {field.name for field in dataclasses.fields(config.Loss)}
    assert set(losses.TERMS) <= keys


def test_weights_that_sum_to_less_than_one_are_a_mean():
    sums = shard.Mean(jnp.array([0.25, 0.05]), jnp.array([0.5, 0.1]))
    assert total._average(sums, None) == np.float32(0.5)
    assert total._average(shard.Mean(jnp.zeros(2), jnp.zeros(2)), None) == 0
