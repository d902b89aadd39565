"""Cycles of the Pallas kernels by libtpu's schedule, no chip: python -m benchmarks.kernels --topology v5e:2x2

A layer of B/16 with 128 images, forward and backward: bundles of a head and stores that spill registers.
`products` is the share of the time that padded products alone would keep the matrix units busy.
JAX's splash attention stands beside ours; its norms, layouts and padding are outside. A share above 100%
means that its schedule hides how often a loop runs: then the products alone take longer than the bundles.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax.launch import chips, compiler, hlo, schedule
from grain_jax.models import attention_kernel, placement

BATCH, LENGTH, WIDTH, HEADS, PADDED = 128, 197, 768, 12, 256
AXES = ("data", "fsdp")


def _attention(x, norms, weight):
    y = attention_kernel.attend(x, heads=HEADS, norms=norms, eps=1e-6)
    return jnp.sum((y * weight).astype(jnp.float32))


def _splash(x, norms, weight):
    """The same by JAX's kernel without the norms: blocks of all PADDED tokens, one backward kernel."""
    del norms
    by_head = lambda x: x.reshape(BATCH, LENGTH, HEADS, -1).swapaxes(1, 2)
    fill = lambda x: jnp.pad(by_head(x), ((0, 0), (0, 0), (0, PADDED - LENGTH), (0, 0)))
    sides = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    blocks = {f"block_{side}": PADDED for side in sides}
    attend = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.FullMask((PADDED, PADDED))] * HEADS),
        block_sizes=splash_attention.BlockSizes(**blocks, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
    )
    real = (jnp.arange(PADDED) < LENGTH).astype(jnp.int32)
    ids = splash_attention.SegmentIds(real, real)
    y = jax.vmap(lambda q, k, v: attend(q, k, v, ids))(*map(fill, jnp.split(x, 3, -1)))
    return jnp.sum((y[:, :, :LENGTH] * by_head(weight)).astype(jnp.float32))


def _schedules(function, topology, *shapes):
    """(name, schedule, instruction) of the kernels of a function and its gradient."""
    with compiler._environment(topology):
        devices = topologies.get_topology_desc(**compiler._options(topology)).devices
        mesh = Mesh(np.array(devices[:1]).reshape(1, 1, 1), (*AXES, "tensor"))
        whole = NamedSharding(mesh, PartitionSpec())
        arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
        graded = jax.value_and_grad(function, argnums=tuple(range(len(shapes) - 1)))
        with placement.on(mesh, AXES):
            text = jax.jit(graded).lower(*arrays).compile().as_text()
        kernels = {i.name: i for _, i, _ in hlo.parse(text).running() if i.target == "tpu_custom_call"}
        for name, bundles in schedule.texts(compiler._dump(), set(kernels)):
            yield name.split(".")[0], bundles, kernels[name].find(r'"body":"([^"]*)"')


def main():
    """Compiles the kernels and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    topology = chips.parse_topology(parser.parse_args().topology)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    x, norm = array(BATCH, LENGTH, WIDTH), array(WIDTH // HEADS, dtype=jnp.float32)
    shapes = array(BATCH, LENGTH, 3 * WIDTH), (norm,) * 4, x
    chip = topology.chip
    schedules = (x for f in (_attention, _splash) for x in _schedules(f, topology, *shapes))
    for name, bundles, body in schedules:
        cycles = schedule.cycles(bundles)
        seconds = cycles / (chip.clock_ghz * 1e9)
        busy = schedule.padded_flops(body) / chip.bf16_flops / seconds
        stores = re.findall(r"= vst[. ][^;]*", bundles)
        spills = sum("_spill" in store for store in stores) / len(stores)
        print(
            f"{name[:24]:<24} {cycles / HEADS / BATCH:5.0f} bundles a head  {seconds * 1e3:5.2f} ms a layer"
            f"  products {busy:4.0%}  spills {spills:4.0%} of the stores"
        )


if __name__ == "__main__":
    main()
