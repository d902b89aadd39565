"""What the compiled step holds on 8 virtual devices, and its metrics (its numbers: test_invariance.py)."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from grain_jax import losses
from grain_jax.launch import hlo
from grain_jax.models import grain
from grain_jax.train import train_step
from tests import tiny


@pytest.fixture(scope="module")
def large():
    """(config, program, [(instruction, whether it runs in a loop) of the compiled step]), every switch on."""
    # 26 images on each part of a device, 19 values an embedding: no other product of sizes has these factors.
    c = tiny.config(
        mesh__data=2,
        mesh__fsdp=4,
        batch_size=8 * 3 * 26,
        model__embed_dim=19,
        loss__tile=64,
        microbatches=3,
        remat="full",
        ema_decay=0.9,
    )
    program = tiny.program(c)
    module = hlo.parse(program.step.lower(program.state, program.batch).compile().as_text())
    computations = module.computations.items()
    placed = [(i, name in module.in_loop) for name, x in computations for i in x.instructions.values()]
    return c, program, placed


def test_only_texts_of_the_global_batch_are_held(large):
    """No array of the compiled step is a product of them, nor has more elements than all descriptions."""
    c, _, placed = large
    b, r = c.batch_size, c.input.max_regions
    most = 1.1 * b * r * c.model.embed_dim  # the last tile of columns is padded
    for instruction, _ in placed:
        for shape in instruction.shapes:
            assert math.prod(shape.dims) not in {b * b, b * r * b, (b * r) ** 2}, instruction
            if {b, b * r, b * (1 + r)} & set(shape.dims):
                assert math.prod(shape.dims) <= most, instruction


def test_fsdp_gathers_a_layer_at_a_time(large):
    _, program, placed = large
    stacked = {
        leaf.shape
        for name, leaf in grain.flat(program.state.params).items()
        if "kernel" in name and "blocks" in name
    }
    layer = {shape[1:] for shape in stacked}
    gathered, in_loops = set(), 0
    for instruction, in_loop in placed:
        if instruction.opcode.startswith("all-gather"):
            for shape in instruction.shapes:
                assert shape.dims not in stacked, instruction
                dims = tuple(n for n in shape.dims if n != 1)
                if in_loop and dims in layer:
                    gathered.add(dims)
                in_loops += in_loop
    assert in_loops and gathered == layer, (gathered, layer)


def test_products_of_the_losses_are_float32_at_highest_precision():
    program = tiny.program(tiny.config(dtype="bfloat16", mesh__data=8))
    jaxpr = jax.make_jaxpr(program.step)(program.state, program.batch)
    products = []

    def visit(jaxpr, inside):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if inside and name == "dot_general":
                types = {v.aval.dtype.name for v in (*equation.invars, *equation.outvars)}
                products.append((types, equation.params["precision"]))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner, inside or name == "shard_map")

    visit(jaxpr.jaxpr, False)
    highest = (jax.lax.Precision.HIGHEST,) * 2
    # Of captions and of descriptions: forward, again for the backward pass, and the gradients of both sides.
    assert len(products) >= 8
    assert all(types == {"float32"} and precision == highest for types, precision in products), products


def test_a_frozen_module_has_no_gradient_norm():
    grads = {
        "image": {"a": jnp.array([3.0]), "b": jnp.array([4.0])},
        "text": {"a": jnp.array([5.0])},
        "box_mlp": jnp.array([6.0]),
        "logit_scale": jnp.array(8.0),
    }
    norms = jax.tree.map(float, train_step.grad_norms(grads, ("text/.*", "image/b")))
    assert norms.pop("grad_norm") == pytest.approx(109**0.5)
    assert norms == {"grad_norm/image": 3.0, "grad_norm/heads": 10.0}


@pytest.mark.parametrize("queries,entropy", [(1, False), (17, True)])
def test_queries_have_metrics_only_where_they_tell_something(queries, entropy):
    share = jnp.full(queries, 1 / queries)
    values = losses.Losses(jnp.float32(0), {}, {"query_share": share})
    metrics = train_step.loss_metrics(values)
    assert ("query_usage_entropy" in metrics) == entropy
    assert sum(name.startswith("query_share/") for name in metrics) == (0 if entropy else 1)
    assert not entropy or abs(metrics["query_usage_entropy"] - 1) < 1e-6
