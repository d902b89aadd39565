import jax
import pytest

from grain_jax import optim, sharding, train_step
from grain_jax.models.grain import GRAIN
from tests import tiny


def _abstract(c):
    model = GRAIN(c.model)
    tx = optim.optimizer(c.optim, lambda step: 0.0)
    return jax.eval_shape(lambda: train_step.init_state(model, c, tx))


def _mesh(data, fsdp, tensor):
    c = tiny.config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    return sharding.make_mesh(c.mesh)


def test_mesh_takes_the_rest_and_refuses_what_does_not_fit():
    assert dict(_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(sharding.ShardingError, match="= 3, expected 8 devices"):
        _mesh(3, 1, 1)


def test_moments_follow_their_parameters():
    c = tiny.config()
    _, placed = sharding.place_state(_abstract(c), c.sharding, _mesh(2, 2, 2))
    spec = placed.params["image"]["blocks"]["mlp"]["in"]["kernel"].spec
    assert tuple(spec) == (None, "fsdp", "tensor")
    assert placed.opt_state[1].mu["image"]["blocks"]["mlp"]["in"]["kernel"].spec == spec
    assert tuple(placed.params["text"]["token_embed"]["embedding"].spec) == ("tensor", "fsdp")
    assert tuple(placed.step.spec) == ()


def test_an_axis_without_a_rule_is_an_error_that_names_the_parameter():
    c = tiny.config()
    rules = tuple(rule for rule in c.sharding if rule[0] != "mlp")
    with pytest.raises(
        sharding.ShardingError, match=r"mlp/in/kernel: `sharding` has no rule for its axis 'mlp'"
    ):
        sharding.place_state(_abstract(c), rules, _mesh(8, 1, 1))


def test_a_dimension_that_does_not_divide_is_an_error():
    c = tiny.config(model__decoder__heads=1)
    with pytest.raises(
        sharding.ShardingError, match=r"axis 'heads' of 1 does not divide by mesh.tensor = 2"
    ):
        sharding.place_state(_abstract(c), c.sharding, _mesh(2, 2, 2))


def test_no_packing_group_is_cut():
    c = tiny.config(text__pack_group=4)
    with pytest.raises(sharding.ShardingError, match="multiple of data x fsdp x microbatches"):
        sharding.check_batch(c, _mesh(8, 1, 1))
