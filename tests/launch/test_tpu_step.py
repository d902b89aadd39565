"""The train step as libtpu compiles it for 64 chips: the ring of the losses and the attention of the towers.

It needs libtpu.
"""

import pytest

from grain_jax.launch import chips, compiler, hlo, hlo_collectives
from tests import tiny

CHIPS = 64
# L_ic and L_rd, forward and backward, both ways round, vectors and labels: to each other chip.
HOPS = 2 * 2 * 2 * 2 * (CHIPS - 1)
TOKENS, LENGTH = 197, 77  # of an image of B/16, of a row of texts
IMAGES = 8  # of a chip


def compiled():
    """The step of a narrow, shallow model with the tokens of B/16, for v5e:8x8."""
    c = tiny.config(
        batch_size=CHIPS * IMAGES,
        dtype="bfloat16",
        text__pack_group=IMAGES,
        text__pack_rows=5,
        input__lanes=CHIPS,
        model__image__image_size=224,
        model__image__patch_size=16,
        model__image__width=128,
        model__image__heads=2,
        model__text__width=128,
        model__text__heads=2,
        model__text__context_length=LENGTH,
        model__decoder__depth=1,
        model__decoder__heads=2,
        model__embed_dim=128,
    )
    lengths = dict(total_steps=10, steps_per_epoch=5.0)
    return compiler.compile_step(c, chips.parse_topology("v5e:8x8"), **lengths)


def _products(module, instruction):
    """The matrix products that an instruction is, or that it calls."""
    products = int(instruction.opcode in ("dot", "convolution"))
    inner = [i for c, _ in module.callees(instruction) for i in c.instructions.values()]
    return products + sum(_products(module, i) for i in inner)


def _check_ring(module):
    """Every hop is a pair, in a loop, with matrix products between its start and its end."""
    hops = 0
    for computation in module.computations.values():
        order = list(computation.instructions.values())
        for index, instruction in enumerate(order):
            assert instruction.opcode != "collective-permute"  # which nothing runs beside
            if instruction.opcode != "collective-permute-start":
                continue
            (done,) = (u for u in computation.users[instruction.name] if "done" in u.opcode)
            between = order[index + 1 : order.index(done)]
            assert sum(_products(module, i) for i in between) > 0, instruction.name
            assert computation.name in module.in_loop
            hops += module.times[computation.name]
    rows = hlo_collectives.collectives(module)
    permutes = [row for row in rows if row.kind == "collective-permute"]
    assert all(row.overlapped and row.group_size == CHIPS for row in permutes)
    assert sum(row.count for row in permutes) == hops
    return hops


def _in_hbm(module, size):
    """Shapes in HBM that have two axes of that size, as the scores of an attention do."""
    return {
        str(shape)
        for computation in module.computations.values()
        if computation.name not in module.fused
        for instruction in computation.instructions.values()
        for shape in instruction.shapes
        if shape.dims.count(size) > 1 and shape.in_hbm
    }


def _check_attention(module):
    """The kernel runs in both towers, forward and backward, and no scores are written to HBM."""
    times = {"attention_forward": 0, "attention_backward": 0}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.target == "tpu_custom_call":
                times[instruction.name.split(".")[0]] += module.times[computation.name]
    assert times == {"attention_forward": 4, "attention_backward": 4}  # two towers of two layers
    assert not _in_hbm(module, TOKENS) and not _in_hbm(module, LENGTH)


@pytest.mark.slow
def test_the_hops_of_the_ring_run_beside_products_and_no_scores_lie_in_hbm():
    module = hlo.parse(compiled().hlo)
    assert _check_ring(module) == HOPS
    _check_attention(module)
