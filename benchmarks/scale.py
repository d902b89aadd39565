"""Streamed losses: memory on a pod, numerical error on 8 devices, micro-batches.

    python -m benchmarks.scale pod           # compiles for 256 chips of v5e with libtpu; needs no chip
    python -m benchmarks.scale exactness     # error against float64, streamed and materialised, on meshes
    python -m benchmarks.scale microbatches  # error and peak memory for k = 1, 2, 4, 8

Each takes `--json OUT.json`. Run from the checkout.
"""

import argparse
import dataclasses
import importlib.metadata
import os

from etils import epath

from benchmarks import side_by_side

FLAGS = "--xla_force_host_platform_device_count=8"
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
WIDTH = 512  # D
MESHES = {"(1)": (1, 1, 1), "(8)": (8, 1, 1), "(4,2)": (4, 2, 1), "(2,2,2)": (2, 2, 2)}


def materialised_losses(outputs, batch, scale, mesh=None):
    """L_ic and L_rd from the matrix of all similarities.

    Duplicates are masked and the negatives are global, as in ours; query i is matched to region i.
    """
    import jax
    import jax.numpy as jnp

    def product(a, b):
        return jnp.einsum("nd,md->nm", a, b, precision=jax.lax.Precision.HIGHEST)

    def cross_entropy(rows, columns, ids, real):
        logits = scale * product(rows, columns)
        own = jnp.eye(len(ids), dtype=bool)
        allowed = own | (real & (ids[:, None] != ids))
        loss = jax.nn.logsumexp(jnp.where(allowed, logits, -jnp.inf), axis=1) - jnp.diagonal(logits)
        return jnp.where(real, loss, 0).sum() / real.sum()

    caption_id = batch.caption_id[:, 0]
    everything = jnp.ones(len(caption_id), bool)
    captions = (outputs.image_embed, outputs.text_embed[:, 0])
    image_caption = sum(
        cross_entropy(*pair, caption_id, everything) for pair in (captions, captions[::-1])
    )
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    regions = cross_entropy(
        flat(outputs.region_embed),
        flat(outputs.region_text_embed),
        flat(batch.description_id),
        flat(batch.region_mask),
    )
    return image_caption / 2, regions


def problem(images: int, regions: int, width: int, seed: int = 0):
    """(outputs, batch) with the fields that the two contrastive losses read; the boxes match query i to region i."""
    import numpy as np

    from grain_jax import schema

    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=(*shape, width))
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    corner = np.linspace(0.1, 0.9, regions)
    boxes = np.broadcast_to(
        np.stack([corner, corner, 0 * corner + 0.1, 0 * corner + 0.1], -1), (images, regions, 4)
    ).astype(np.float32)
    outputs = schema.Outputs(
        unit(images),
        unit(images, 1),
        unit(images, regions),
        unit(images, regions),
        boxes[None],
        np.float32(1 / 0.07),
        np.float32(0),
    )
    nothing = dict.fromkeys(schema.Batch._fields)
    batch = schema.Batch(**nothing)._replace(
        caption_id=rng.integers(0, 2 * images, (images, 1)).astype(np.int32),
        caption_mask=np.ones((images, 1), bool),
        description_id=rng.integers(0, images, (images, regions)).astype(np.int32),
        region_boxes_cxcywh=boxes,
        region_mask=rng.random((images, regions)) < 0.7,
    )
    return outputs, batch


def pod(args) -> dict:
    """MB of temporaries a chip of value and gradient of both losses, on 256 chips of v5e."""
    os.environ.update(LIBTPU)
    import jax
    from grain_jax.launch import hlo, hlo_collectives
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from grain_jax import config as config_lib
    from grain_jax import losses, recipe
    from grain_jax.training import sharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    settings = recipe.base("B/16")
    settings.total_steps, settings.optim.warmup_steps = 1, 0
    config = config_lib.from_dict(settings)
    mesh = sharding.make_mesh(config.mesh, devices)
    place = sharding.batch_sharding(mesh)
    rows = []
    print(f"v5e:16x16, libtpu {importlib.metadata.version('libtpu')}, D = {WIDTH}, MB a chip")
    print(f"{'global batch':>12} {'losses':34} {'temporaries':>12}  collectives")
    for images in args.batches:
        variants = {
            "captions, materialised": (0, None),
            "captions, streamed": (0, 1),
            "captions and 5 regions, streamed": (5, 1),
            "the same, gather = 4": (5, 4),
            "the same, gather = 16": (5, 16),
        }
        for name, (regions, gather) in variants.items():
            outputs, batch = abstract_problem(images, regions, WIDTH)
            loss = dataclasses.replace(config.loss, gather=gather or 1)

            def total(outputs, batch, loss=loss, gather=gather):
                if gather is None:
                    return materialised_losses(outputs, batch, outputs.logit_scale)[0]
                return losses.total_loss(
                    outputs, batch, loss, mesh=mesh, batch_axes=sharding.BATCH_AXES
                ).total

            whole = NamedSharding(mesh, PartitionSpec())
            of_layers = NamedSharding(mesh, PartitionSpec(None, *place.spec))
            cut = type(outputs)(place, place, place, place, of_layers, whole, whole)
            step = jax.jit(
                jax.value_and_grad(total), in_shardings=(cut, place), out_shardings=(whole, cut)
            )
            compiled = step.lower(outputs, batch).compile()
            megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
            found = hlo_collectives.collectives(hlo.parse(compiled.as_text()))
            kinds = [
                f"{c.count} {c.kind}{' overlapped' if c.overlapped else ''} ({c.bytes / 1e6:,.1f} MB)"
                for c in found
                if c.bytes > 1e4
            ]
            rows.append(
                dict(images=images, losses=name, temporaries_mb=megabytes, collectives=kinds)
            )
            print(f"{images:12,} {name:34} {megabytes:12,.1f}  {', '.join(kinds)}", flush=True)
    return {"rows": rows}


def abstract_problem(images: int, regions: int, width: int):
    """`problem` as shapes, for compilation; masks are arguments, so that XLA folds no constants."""
    import jax

    outputs, batch = problem(8, regions, width)

    def grow(x, axis=0):
        shape = list(x.shape)
        if shape:
            shape[axis] = images
        return jax.ShapeDtypeStruct(shape, x.dtype)

    grown = type(outputs)(*map(grow, outputs))
    return grown._replace(pred_boxes_cxcywh=grow(outputs.pred_boxes_cxcywh, 1)), jax.tree.map(
        grow, batch
    )


def exactness(args) -> dict:
    """Relative error of L_ic + L_rd and of its gradient against float64, streamed and materialised."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    import math

    import jax
    import numpy as np

    from grain_jax import config as config_lib
    from grain_jax import losses, recipe
    from grain_jax.training import sharding

    settings = recipe.base("B/16")
    settings.total_steps, settings.optim.warmup_steps = 1, 0
    settings.loss.update(box=0.0, tile=args.tile)
    config = config_lib.from_dict(settings)

    def plain(outputs, batch):
        return sum(materialised_losses(outputs, batch, outputs.logit_scale))

    variants = {"materialised": jax.jit(jax.value_and_grad(plain))}
    for name, sizes in MESHES.items():
        axes = dict(zip(("data", "fsdp", "tensor"), sizes))
        mesh = sharding.make_mesh(
            dataclasses.replace(config.mesh, **axes), jax.devices()[: math.prod(sizes)]
        )
        variants[f"streamed, mesh {name}"] = jax.jit(
            jax.value_and_grad(
                lambda o, b, mesh=mesh: (
                    losses.total_loss(
                        o, b, config.loss, mesh=mesh, batch_axes=sharding.BATCH_AXES
                    ).total
                )
            )
        )
    in_float64 = jax.jit(jax.value_and_grad(plain))
    fields = ("image_embed", "text_embed", "region_embed", "region_text_embed")
    found = {name: [] for name in variants}
    for seed in range(args.seeds):
        outputs, batch = problem(args.images, 5, WIDTH, seed)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)
            expected, truth = jax.tree.map(np.asarray, in_float64(wide, batch))
        for name, run in variants.items():
            value, grads = run(outputs, batch)
            errors = [abs(float(value) - expected) / expected]
            for field in fields:
                a, b = np.asarray(getattr(grads, field), np.float64), getattr(truth, field)
                errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
            found[name].append((errors[0], max(errors[1:])))
    print(
        f"{args.images} images, 5 regions, D = {WIDTH}, tile {args.tile}; worst relative error against"
        f" float64 of {args.seeds} draws"
    )
    print(f"{'losses':24} {'value':>12} {'gradient':>12}")
    rows = []
    for name, errors in found.items():
        value, gradient = np.max(errors, axis=0)
        rows.append(dict(losses=name, value=float(value), gradient=float(gradient)))
        print(f"{name:24} {value:12.2e} {gradient:12.2e}")
    return {"rows": rows}


def microbatches(args) -> dict:
    """Difference of the gradient and temporaries of one step for k micro-batches, tiny model, on one CPU device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grain_jax import config as config_lib
    from grain_jax import recipe
    from grain_jax.input_pipeline import synthetic
    from grain_jax.models.grain import GRAIN
    from grain_jax.training import optim, sharding, train_step

    settings = recipe.base("tiny")
    settings.total_steps, settings.optim.warmup_steps = 10, 1
    settings.batch_size, settings.dtype = args.images, "float32"
    settings.input.update(source="synthetic", lanes=1)
    settings.text.update(pack_group=8, pack_rows=8)
    for tower in ("image", "text", "decoder"):
        settings.model[tower].unroll = 1
    expected, rows = None, []
    print(f"tiny model, {args.images} images, float32, one CPU device")
    print(f"{'k':>2} {'temporaries MB':>15} {'gradient against k = 1':>24} {'loss':>12}")
    for k in (1, 2, 4, 8):
        settings.microbatches = k
        config = config_lib.from_dict(settings)
        model = GRAIN(config.model)
        tx = optim.optimizer(config.optim, lambda step: 0.0)
        params = jax.jit(
            lambda model=model, config=config, tx=tx: (
                sharding.unbox(train_step.init_state(model, config, tx)).params
            )
        )()
        batch = jax.tree.map(jnp.asarray, next(synthetic.batches(config)))
        keys = train_step.dropout_keys(0, 3, jnp.arange(config.batch_size))

        def run(params, batch, keys, model=model, config=config):
            terms, grads = train_step.loss_and_grads(model, config, None, params, batch, keys)
            return terms.total, grads

        compiled = jax.jit(run).lower(params, batch, keys).compile()
        loss, grads = jax.tree.map(np.asarray, compiled(params, batch, keys))
        flat = np.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
        expected = flat if expected is None else expected
        error = float(np.linalg.norm(flat - expected) / np.linalg.norm(expected))
        megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
        rows.append(dict(k=k, temporaries_mb=megabytes, gradient=error, loss=float(loss)))
        print(f"{k:2} {megabytes:15,.1f} {error:24.2e} {float(loss):12.6f}", flush=True)
    return {"rows": rows}


def main() -> None:
    """Runs one of the three and prints its table; writes it as JSON on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["pod", "exactness", "microbatches"])
    parser.add_argument("--batches", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tile", type=int, default=100)
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = globals()[args.what](args)
    side_by_side.write(args.json, {"machine": side_by_side.machine("jax"), **result})


if __name__ == "__main__":
    main()
