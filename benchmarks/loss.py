"""Time and memory of the contrastive losses: streamed (ours), and from the matrix of all similarities.

    python -m benchmarks.loss [--batches 256 1024 4096] [--turns 7] [--json OUT.json]

Value and gradient of L_ic + L_rd (5 regions an image) with respect to all embeddings, in turns in one process on one
device. Both use HIGHEST precision, and their values must agree.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, stopwatch
from grain_jax import losses
from grain_jax.core import schema

WIDTH = 512  # of the embeddings, D
REGIONS = 5


def materialised(outputs: schema.Outputs, batch: schema.Batch):
    """(L_ic, L_rd) from the matrix of all similarities, duplicates masked, query i matched to region i."""

    def cross_entropy(rows, columns, ids, real):
        product = jnp.einsum("nd,md->nm", rows, columns, precision=jax.lax.Precision.HIGHEST)
        logits = outputs.logit_scale * product
        allowed = jnp.eye(len(ids), dtype=bool) | (real & (ids[:, None] != ids))
        loss = jax.nn.logsumexp(jnp.where(allowed, logits, -jnp.inf), axis=1) - jnp.diagonal(logits)
        return jnp.where(real, loss, 0).sum() / real.sum()

    ids = batch.caption_id[:, 0]
    image, text = outputs.image_embed, outputs.text_embed[:, 0]
    everything = jnp.ones(len(ids), bool)
    captions = [cross_entropy(*x, ids, everything) for x in ((image, text), (text, image))]
    of_regions = (outputs.region_embed, outputs.region_text_embed, batch.description_id)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (*of_regions, batch.region_mask))
    return sum(captions) / 2, cross_entropy(*flat)


def problem(images: int):
    """(outputs, batch) with the fields that the two losses read; the boxes match query i to region i."""
    rng = np.random.default_rng(0)

    def unit(*shape):
        x = rng.normal(size=(*shape, WIDTH))
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    boxes = rng.uniform(0.2, 0.8, (images, REGIONS, 4)).astype(np.float32)
    outputs = schema.Outputs(
        image_embed=unit(images),
        text_embed=unit(images, 1),
        region_embed=unit(images, REGIONS),
        region_text_embed=unit(images, REGIONS),
        pred_boxes_cxcywh=boxes[None],
        logit_scale=np.float32(1 / 0.07),
        logit_bias=np.float32(0),
    )
    batch = schema.Batch(**dict.fromkeys(schema.Batch._fields))._replace(
        caption_id=rng.integers(0, 2 * images, (images, 1)).astype(np.int32),
        caption_mask=np.ones((images, 1), bool),
        description_id=rng.integers(0, images, (images, REGIONS)).astype(np.int32),
        region_boxes_cxcywh=boxes,
        region_mask=rng.random((images, REGIONS)) < 0.7,
    )
    return outputs, batch


def timed(table: harness.Table, images: int, turns: int) -> None:
    """Adds the seconds and temporaries of both losses on one device."""
    config = harness.config("tiny", {"loss.box": 0.0}).loss
    ways = {
        "streamed": lambda *x: losses.total_loss(*x, config).total,
        "materialised": lambda *x: sum(materialised(*x)),
    }
    given = jax.device_put(problem(images))
    compiled = {
        name: jax.jit(jax.value_and_grad(way)).lower(*given).compile() for name, way in ways.items()
    }
    runs = {name: lambda run=run: float(run(*given)[0]) for name, run in compiled.items()}
    timings = stopwatch.in_turns(runs, turns)
    values = {name: timing.value for name, timing in timings.items()}
    stopwatch.agree(values, 1e-5, f"{images} images: the losses")
    for name, run in compiled.items():
        row = dict(images=images, losses=name, seconds=timings[name].seconds)
        table.add(**row, temporaries_mb=run.memory_analysis().temp_size_in_bytes / 1e6)


def main() -> None:
    """Prints a row for each batch size and way."""
    args = harness.arguments(__doc__, batches=[256, 1024, 4096], turns=7)
    about = f"D = {WIDTH}, float32, {jax.devices()[0].device_kind}"
    machine = harness.machine("jax", about=about)
    columns = dict(images=">8,", losses="14", seconds=">28.3f", temporaries_mb=">15,.1f")
    table = harness.Table(columns)
    for images in args.batches:
        timed(table, images, args.turns)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
