"""Streamed losses: memory on a pod, numerical error on 8 devices.

    python -m benchmarks.scale pod           # compiles for 256 chips of v5e with libtpu; needs no chip
    python -m benchmarks.scale exactness     # error against float64, streamed and materialised, on meshes

Each takes `--json OUT.json`. Run from the checkout.
"""

import argparse
import dataclasses
import importlib.metadata
import math
import os
from typing import Any

from benchmarks import harness

FLAGS = "--xla_force_host_platform_device_count=8"
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MESHES = {"(1)": (1, 1, 1), "(8)": (8, 1, 1), "(4,2)": (4, 2, 1), "(2,2,2)": (2, 2, 2)}
# Regions an image, and `loss.gather` of the streamed losses; None: from the whole matrix.
ON_THE_POD = {
    "captions, materialised": (0, None),
    "captions, streamed": (0, 1),
    "captions and 5 regions, streamed": (5, 1),
    "the same, gather = 4": (5, 4),
    "the same, gather = 16": (5, 16),
}
Rows = list[dict[str, Any]]


def streamed(loss: Any, mesh: Any):
    """The function (outputs, batch) -> L_ic + L_rd by our losses on a mesh."""
    from grain_jax import losses
    from grain_jax.training import sharding

    axes = dict(mesh=mesh, batch_axes=sharding.BATCH_AXES)
    return lambda outputs, batch: losses.total_loss(outputs, batch, loss, **axes).total


def pod(args: argparse.Namespace) -> Rows:
    """MB of temporaries a chip of value and gradient of both losses, on 256 chips of v5e."""
    os.environ.update(LIBTPU)
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.loss import WIDTH, materialised
    from grain_jax.launch import hlo, hlo_collectives
    from grain_jax.training import sharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    config = harness.config("B/16", {})
    mesh = sharding.make_mesh(config.mesh, devices)
    place, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    print(f"v5e:16x16, libtpu {importlib.metadata.version('libtpu')}, D = {WIDTH}, MB a chip")
    columns = dict(images=">12,", losses="34", temporaries_mb=">14,.1f", collectives="<1")
    table = harness.Table(columns)
    for images in args.batches:
        for name, (regions, gather) in ON_THE_POD.items():
            outputs, batch = abstract_problem(images, regions, WIDTH)
            total = streamed(dataclasses.replace(config.loss, gather=gather or 1), mesh)
            if gather is None:
                total = lambda outputs, batch: materialised(outputs, batch)[0]
            cut = jax.tree.map(lambda x: place if x.shape else whole, outputs)
            of_layers = NamedSharding(mesh, PartitionSpec(None, *place.spec))
            cut = cut._replace(pred_boxes_cxcywh=of_layers)
            step = jax.jit(
                jax.value_and_grad(total), in_shardings=(cut, place), out_shardings=(whole, cut)
            )
            compiled = step.lower(outputs, batch).compile()
            megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
            kinds = [
                f"{c.count} {c.kind}{' overlapped' if c.overlapped else ''} ({c.bytes / 1e6:,.1f} MB)"
                for c in hlo_collectives.collectives(hlo.parse(compiled.as_text()))
                if c.bytes > 1e4
            ]
            found = dict(temporaries_mb=megabytes, collectives=kinds)
            table.add(images=images, losses=name, **found)
    return table.rows


def abstract_problem(images: int, regions: int, width: int):
    """`loss.problem` as shapes, for compilation; masks are arguments, so that XLA folds no constants."""
    import jax

    from benchmarks import loss

    small = 8

    def grow(x):
        shape = [images if n == small else n for n in x.shape]
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(grow, loss.problem(small, regions, width))


def exactness(args: argparse.Namespace) -> Rows:
    """Relative error of L_ic + L_rd and of its gradient against float64, streamed and materialised."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    import jax
    import numpy as np

    from benchmarks.loss import WIDTH, materialised, problem
    from grain_jax.training import sharding

    config = harness.config("B/16", {"loss.box": 0.0, "loss.tile": args.tile})
    compiled = lambda total: jax.jit(jax.value_and_grad(total))
    plain = lambda outputs, batch: sum(materialised(outputs, batch))
    variants = {"materialised": compiled(plain)}
    for name, sizes in MESHES.items():
        axes = dict(zip(("data", "fsdp", "tensor"), sizes))
        devices = jax.devices()[: math.prod(sizes)]
        mesh = sharding.make_mesh(dataclasses.replace(config.mesh, **axes), devices)
        variants[f"streamed, mesh {name}"] = compiled(streamed(config.loss, mesh))
    in_float64 = compiled(plain)
    fields = ("image_embed", "text_embed", "region_embed", "region_text_embed")
    found = {name: [] for name in variants}
    for seed in range(args.seeds):
        outputs, batch = problem(args.images, 5, WIDTH, seed)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)
            expected, truth = jax.tree.map(np.asarray, in_float64(wide, batch))
        for name, run in variants.items():
            value, grads = run(outputs, batch)
            pairs = [(np.asarray(getattr(grads, f), np.float64), getattr(truth, f)) for f in fields]
            worst = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
            found[name].append((abs(float(value) - expected) / expected, worst))
    print(
        f"{args.images} images, 5 regions, D = {WIDTH}, tile {args.tile}; worst relative error against"
        f" float64 of {args.seeds} draws"
    )
    table = harness.Table(dict(losses="24", value=">12.2e", gradient=">12.2e"))
    for name, errors in found.items():
        value, gradient = np.max(errors, axis=0).tolist()
        table.add(losses=name, value=value, gradient=gradient)
    return table.rows


def main() -> None:
    """Runs one of the two and prints its table; writes it as JSON on request."""
    what = {"pod": pod, "exactness": exactness}
    args = harness.arguments(
        __doc__,
        command=(str, dict(choices=what)),
        batches=[65536, 262144],
        images=256,
        seeds=10,
        tile=100,
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    machine = harness.machine("jax")
    harness.write(args.json, dict(machine=machine, rows=what[args.command](args)))


if __name__ == "__main__":
    main()
