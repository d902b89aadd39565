"""Time and memory of the contrastive losses: streamed (ours), and from the matrix of all similarities.

    python -m benchmarks.loss [--batches 256 1024 4096] [--turns 7] [--json OUT.json]

Value and gradient of L_ic + L_rd (5 regions an image) with respect to all embeddings, on one device, in turns in
one process. Both use HIGHEST precision, and their values must agree. `benchmarks.scale` compiles both for 256 chips.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from grain_jax import losses
from grain_jax.core import schema

WIDTH = 512  # of the embeddings, D
REGIONS = 5


def materialised(outputs: schema.Outputs, batch: schema.Batch):
    """(L_ic, L_rd) from the matrix of all similarities.

    Duplicates are masked and the negatives are global, as in ours; query i is matched to region i.
    """

    def cross_entropy(rows, columns, ids, real):
        product = jnp.einsum("nd,md->nm", rows, columns, precision=jax.lax.Precision.HIGHEST)
        logits = outputs.logit_scale * product
        allowed = jnp.eye(len(ids), dtype=bool) | (real & (ids[:, None] != ids))
        loss = jax.nn.logsumexp(jnp.where(allowed, logits, -jnp.inf), axis=1) - jnp.diagonal(logits)
        return jnp.where(real, loss, 0).sum() / real.sum()

    ids = batch.caption_id[:, 0]
    image, text = outputs.image_embed, outputs.text_embed[:, 0]
    both = ((image, text), (text, image))
    captions = sum(cross_entropy(*pair, ids, jnp.ones(len(ids), bool)) for pair in both)
    of_regions = (outputs.region_embed, outputs.region_text_embed)
    of_regions += (batch.description_id, batch.region_mask)
    flat = (x.reshape(-1, *x.shape[2:]) for x in of_regions)
    return captions / 2, cross_entropy(*flat)


def problem(images: int, regions: int, width: int, seed: int = 0):
    """(outputs, batch) with the fields that the two contrastive losses read; the boxes match query i to region i."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=(*shape, width))
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    corner = np.linspace(0.1, 0.9, regions)
    side = np.full(regions, 0.1)
    boxes = np.tile(np.stack([corner, corner, side, side], -1), (images, 1, 1)).astype(np.float32)
    outputs = schema.Outputs(
        image_embed=unit(images),
        text_embed=unit(images, 1),
        region_embed=unit(images, regions),
        region_text_embed=unit(images, regions),
        pred_boxes_cxcywh=boxes[None],
        logit_scale=np.float32(1 / 0.07),
        logit_bias=np.float32(0),
    )
    batch = schema.Batch(**dict.fromkeys(schema.Batch._fields))._replace(
        caption_id=rng.integers(0, 2 * images, (images, 1)).astype(np.int32),
        caption_mask=np.ones((images, 1), bool),
        description_id=rng.integers(0, images, (images, regions)).astype(np.int32),
        region_boxes_cxcywh=boxes,
        region_mask=rng.random((images, regions)) < 0.7,
    )
    return outputs, batch


def _value(run, outputs, batch) -> float:
    return float(jax.block_until_ready(run(outputs, batch))[0])


def main() -> None:
    """Times both for each batch size and prints medians, spread and temporaries."""
    args = harness.arguments(__doc__, batches=[256, 1024, 4096], turns=7)
    config = harness.config("tiny", {"loss.box": 0.0}).loss
    ways = {
        "streamed": lambda outputs, batch: losses.total_loss(outputs, batch, config).total,
        "materialised": lambda outputs, batch: sum(materialised(outputs, batch)),
    }
    about = f"D = {WIDTH}, float32, {jax.devices()[0].device_kind}"
    machine = harness.machine("jax", about=about)
    columns = dict(images=">7", losses="14", seconds=">28.3f", temporaries_mb=">15,.1f")
    table = harness.Table(columns)
    for images in args.batches:
        given = jax.device_put(problem(images, REGIONS, WIDTH))
        compiled = {
            name: jax.jit(jax.value_and_grad(way)).lower(*given).compile()
            for name, way in ways.items()
        }
        runs = {name: functools.partial(_value, run, *given) for name, run in compiled.items()}
        timings = harness.in_turns(runs, turns=args.turns)
        values = {name: timing.value for name, timing in timings.items()}
        harness.agree(values, 1e-5, f"{images} images: the losses")
        for name, run in compiled.items():
            megabytes = run.memory_analysis().temp_size_in_bytes / 1e6
            seconds = timings[name].seconds
            table.add(images=images, losses=name, seconds=seconds, temporaries_mb=megabytes)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
