"""Time and memory of the contrastive losses: streamed (ours), and from the matrix of all similarities.

    python -m benchmarks.loss [--batches 256 1024 4096] [--turns 7] [--json OUT.json]
    python -m benchmarks.loss --pod      # memory on 256 chips of v5e: compiled by libtpu, needs no chip

Value and gradient of L_ic + L_rd (5 regions an image) with respect to all embeddings, in turns in one process on one
device. Both use HIGHEST precision, and their values must agree.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import harness, stopwatch
from grain_jax import losses
from grain_jax.core import schema
from grain_jax.launch import chips, compiler, hlo, hlo_collectives
from grain_jax.training import sharding

WIDTH = 512  # of the embeddings, D
REGIONS = 5
# Regions an image, and `loss.gather` of the streamed losses; None: from the whole matrix.
ON_THE_POD = {
    "captions, materialised": (0, None),
    "captions, streamed": (0, 1),
    "captions and 5 regions, streamed": (5, 1),
    "the same, gather = 4": (5, 4),
    "the same, gather = 16": (5, 16),
}


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


def problem(images: int, regions: int):
    """(outputs, batch) with the fields that the two losses read; the boxes match query i to region i."""
    rng = np.random.default_rng(0)

    def unit(*shape):
        x = rng.normal(size=(*shape, WIDTH))
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    boxes = rng.uniform(0.2, 0.8, (images, regions, 4)).astype(np.float32)
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


def timed(table: harness.Table, images: int, turns: int) -> None:
    """Adds the seconds and temporaries of both losses on one device."""
    config = harness.config("tiny", {"loss.box": 0.0}).loss
    ways = {
        "streamed": lambda *x: losses.total_loss(*x, config).total,
        "materialised": lambda *x: sum(materialised(*x)),
    }
    given = jax.device_put(problem(images, REGIONS))
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


def on_the_pod(table: harness.Table, images: int, _turns: int) -> None:
    """Adds the temporaries and the collectives of a chip of v5e:16x16."""
    os.environ.update(compiler.environment(chips.parse_topology("v5e:16x16")))
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    config = harness.config("B/16", {})
    mesh = sharding.make_mesh(config.mesh, devices)
    axes = dict(mesh=mesh, batch_axes=sharding.BATCH_AXES)
    place, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    for name, (regions, gather) in ON_THE_POD.items():
        # As shapes: masks are arguments, so that XLA folds no constants.
        grow = lambda x: jax.ShapeDtypeStruct([images if n == 8 else n for n in x.shape], x.dtype)
        outputs, batch = jax.tree.map(grow, problem(8, regions))
        total = lambda outputs, batch: materialised(outputs, batch)[0]
        if gather is not None:
            loss = dataclasses.replace(config.loss, gather=gather)
            total = lambda *x, loss=loss: losses.total_loss(*x, loss, **axes).total
        cut = jax.tree.map(lambda x: place if x.shape else whole, outputs)
        cut = cut._replace(pred_boxes_cxcywh=NamedSharding(mesh, PartitionSpec(None, *place.spec)))
        shardings = dict(in_shardings=(cut, place), out_shardings=(whole, cut))
        compiled = jax.jit(jax.value_and_grad(total), **shardings).lower(outputs, batch).compile()
        kinds = [
            f"{c.count} {c.kind}{' overlapped' if c.overlapped else ''} ({c.bytes / 1e6:,.1f} MB)"
            for c in hlo_collectives.collectives(hlo.parse(compiled.as_text()))
            if c.bytes > 1e4
        ]
        row = dict(images=images, losses=name, collectives=kinds)
        table.add(**row, temporaries_mb=compiled.memory_analysis().temp_size_in_bytes / 1e6)


def main() -> None:
    """Prints a row for each batch size and way."""
    args = harness.arguments(__doc__, batches=(int, dict(nargs="+")), turns=7, pod=False)
    if args.pod:
        jax.config.update("jax_platforms", "cpu")  # libtpu compiles
    where = "MB a chip of v5e:16x16" if args.pod else jax.devices()[0].device_kind
    machine = harness.machine("jax", about=f"D = {WIDTH}, float32, {where}")
    columns = dict(images=">8,", losses="34", seconds=">28.3f", temporaries_mb=">15,.1f")
    table = harness.Table(columns | dict(collectives="<1"))
    for images in args.batches or ((65_536, 262_144) if args.pod else (256, 1024, 4096)):
        add = on_the_pod if args.pod else timed
        add(table, images, args.turns)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
