"""The train step as libtpu compiles it for 64 chips: the texts of the losses and the attention of the towers.

It needs libtpu.
"""

import pytest

from grain_jax.launch import chips, compiler, hlo, hlo_collectives
from tests import tiny

CHIPS, EMBED = 64, 128
TOKENS, LENGTH = 197, 77  # of an image of B/16, of a row of texts
IMAGES = 8  # of a chip


@pytest.mark.slow
def test_texts_are_gathered_once_and_no_scores_lie_in_hbm():
    """Of a narrow, shallow model with the tokens of B/16, for v5e:8x8."""
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
        model__embed_dim=EMBED,
    )
    lengths = dict(total_steps=10, steps_per_epoch=5.0)
    module = hlo.parse(compiler.compile_step(c, chips.parse_topology("v5e:8x8"), **lengths).hlo)
    # One caption and the descriptions of each image, in float32, forward; their gradients go back.
    rows = hlo_collectives.collectives(module)
    texts = CHIPS * IMAGES * (1 + c.input.max_regions)
    gathered = sum(row.bytes for row in rows if row.kind == "all-gather")
    assert 1 <= gathered / (texts * EMBED * 4) < 1.1  # ids and masks, too
    assert not [row for row in rows if row.kind == "collective-permute" and row.group_size == CHIPS]
    # The kernel of attention runs in both towers of two layers, and no scores are written to HBM.
    times = {"attention_forward": 0, "attention_backward": 0}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.target == "tpu_custom_call":
                times[instruction.name.split(".")[0]] += module.times[computation.name]
            if computation.name not in module.fused:
                in_hbm = [shape.dims for shape in instruction.shapes if shape.in_hbm]
                assert not [x for x in in_hbm for n in (TOKENS, LENGTH) if x.count(n) > 1], instruction
    assert times == {"attention_forward": 4, "attention_backward": 4}
