"""Memory and traffic of a step by arithmetic, for GPUs where the CUDA plugin of JAX is not installed. An estimate.

Exact are the state's bytes and what the forward pass keeps for the backward pass, which is read off the traced
program. XLA adds buffers that are not counted here and fuses others away; docs/scaling.md has both beside each other.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.launch import chips, hlo_collectives
from grain_jax.training import forward, memory_need, phases, sharding, teacher, train_step


class Estimate(NamedTuple):
    """Bytes of one chip, and what is needed for the rest of a plan.

    Attributes:
      state_bytes: parameters, moments, ema, batch.
      temporaries: as of memory_need.temporaries.
      checkpoint_bytes: of what a checkpoint holds, all chips together.
      collectives: what one step sends.
      mesh: sizes of the mesh's axes.
    """

    state_bytes: dict[str, int]
    temporaries: dict[str, int]
    checkpoint_bytes: int
    collectives: list[hlo_collectives.Collective]
    mesh: dict[str, int]


def mesh_sizes(mesh: config_lib.Mesh, count: int, nodes: int) -> dict[str, int]:
    """The sizes of the (data, fsdp, tensor) mesh over `count` chips of so many nodes. Raises ShardingError."""
    sizes = sharding.mesh_sizes(mesh, count)
    if sizes["data"] % nodes or sizes["data"] % mesh.dcn_data:
        raise sharding.ShardingError(
            f"mesh: got data = {sizes['data']} (mesh.dcn_data={mesh.dcn_data}) on {nodes} slices or nodes,"
            " expected a multiple of both: nothing but data is cut over the network between them"
        )
    return sizes


def of_gpus(
    config: config_lib.Config, topology: chips.Topology, phase: phases.Phase | None = None
) -> Estimate:
    """Estimates a step of a phase on these GPUs; by default of that which computes most.

    Assumed: where cuDNN makes the attention, its scores are not kept; activations are cut over data and fsdp, not
    over tensor; gradients are float32, and summed so over devices, twice with micro-batches (their sum, and a part's).

    Raises:
      ShardingError: the mesh does not fit the chips, or the batch does not fit the mesh.
    """
    by_cudnn = config.model.attention in ("auto", "cudnn") and config.dtype == "bfloat16"
    # cuDNN's own program cannot be traced without it.
    model = dataclasses.replace(config.model, attention="xla")
    config = dataclasses.replace(config, model=model)
    sizes = mesh_sizes(config.mesh, topology.count, topology.slices)
    program = train_step.build(
        config,
        AbstractMesh(tuple(sizes.values()), tuple(sizes)),
        total_steps=1,
        steps_per_epoch=1.0,
    )
    if phase is not None:
        config = phases.at(config, phase)  # the state has all terms
        program = program._replace(batch=forward.abstract_batch(config))
    state = memory_need.state_bytes(program)
    trained = memory_need.trained_bytes(program, config.frozen)
    shards = sizes["data"] * sizes["fsdp"]
    temporaries = memory_need.temporaries(config, program, shards)
    if by_cudnn:
        part = config.batch_size // shards // config.microbatches
        temporaries["activations"] -= _scores(config, part)
        everything = _scores(dataclasses.replace(config, remat="none"), part)
        temporaries["layer"] -= everything // config.model.image.depth
    return Estimate(
        state,
        temporaries,
        memory_need.checkpoint_bytes(config, program),
        _collectives(config, topology, sizes, state["parameters"], trained),
        sizes,
    )


def _scores(config: config_lib.Config, images: int) -> int:
    """Bytes of the softmaxes [.., heads, L, L] of the towers that are kept for the backward pass."""
    shapes = [
        (x.shape.partition("[")[2][:-1].split(","), x) for x in memory_need.kept(config, images)
    ]
    return sum(x.bytes for dims, x in shapes if len(dims) > 3 and dims[-1] == dims[-2])


def _collectives(config, topology, sizes, parameters, trained) -> list[hlo_collectives.Collective]:
    """Gradients and parameters that are summed and gathered, and the rings of the losses.

    `parameters` and `trained` are bytes a chip.
    """

    def collective(kind, axis, count, size):
        # Of several nodes only the data axis leaves one.
        slices = topology.slices if axis == "data" else 1
        return hlo_collectives.Collective(
            kind, True, False, sizes[axis], slices, (axis,), count, size
        )

    parts, fsdp = config.microbatches, sizes["fsdp"]  # gradients are summed once a part
    # Forward and backward gather the parameters, the latter those that something trains behind.
    out = [
        collective("all-reduce", "data", parts, parts * trained),
        collective("all-gather", "fsdp", 2 * parts, parts * (parameters + trained) * fsdp),
        collective("reduce-scatter", "fsdp", parts, parts * trained * fsdp),
        collective("all-reduce", "tensor", *_tensor_sums(config, sizes)),
    ]
    out = [of_mesh for of_mesh in out if of_mesh.group_size > 1]
    return out + rings(config, topology, sizes["data"] * fsdp)


def rings(config, topology, shards) -> list[hlo_collectives.Collective]:
    """The vectors that a chip sends round the rings of the contrastive losses, forward and backward.

    Labels, which travel beside the vectors, are not counted.

    Args:
      config: of the run.
      topology: the chips.
      shards: parts that the batch is cut into.
    """
    layout = losses.make_layout(config.batch_size, config.loss, shards)
    images, regions = config.batch_size // shards, config.input.max_regions
    captions = config.input.captions_per_image
    softmax = config.loss.contrast == "softmax"

    def of_both(ring, columns, rows, shared=0):
        # Columns alone, or columns forward and rows backward.
        if softmax:
            return ring, 2 * columns, columns, 1 - shared
        return ring, columns + rows, 0, 2 - shared

    # (ring, vectors that travel forward or backward, gradients that travel behind those, gathers of half of them):
    # losses/streaming.py. XLA gathers once what is gathered forward and backward, or by two terms.
    terms = [of_both(layout.everywhere, images, images * captions)]
    has_queries = config.model.decoder is not None and config.model.decoder.queries > 0
    if has_queries:
        terms.append((layout.in_group, 2 * images * regions, 0, 2))
    if config.loss.image_description and regions:
        terms.append(of_both(layout.everywhere, images, images * regions))
    if config.loss.box_description:
        terms.append(of_both(layout.in_group, images * regions, images * regions, has_queries))
    known = teacher.describe(config)
    if known and any(x["term"] == "teacher_similarity" for x in config.loss.terms.values()):
        # Both embeddings of the images travel, and the gradients of the student's.
        both = 1 + known.embed_dim / config.model.embed_dim
        terms.append((layout.everywhere, round(2 * images * both), images, 1))
    out = []
    for ring, vectors, gradients, gathers in terms:
        together = config.loss.gather if ring.gather else 1
        size = together * config.model.embed_dim * memory_need.FLOAT  # of one vector a chip
        if ring.gather and vectors:
            args = (True, False, together, 1, sharding.BATCH_AXES)
            for kind, count, sent in (
                ("all-gather", gathers, vectors * size * gathers // 2),
                ("reduce-scatter", 1, gradients * size),
            ):
                if sent:
                    out.append(hlo_collectives.Collective(kind, *args, count, sent))
        hops = ring.size - 1
        if hops and vectors:
            # Of the gradients the first hop carries zeros, and the last one takes them to their device.
            back = hops + 2 if gradients else 0
            # A group's ring leaves its node only where the group is larger.
            slices = min(topology.slices, -(-ring.size * together // math.prod(topology.shape)))
            args = ("collective-permute", True, True, ring.size, slices, sharding.BATCH_AXES)
            sent = (hops * vectors + back * gradients) * size
            out.append(hlo_collectives.Collective(*args, 2 * hops + back, sent))
    return out


def _tensor_sums(config, sizes) -> tuple[int, int]:
    """(count, bytes a chip) of the sums over `tensor`: two a layer forward, two backward, each of all tokens."""
    images = config.batch_size // (sizes["data"] * sizes["fsdp"])
    batch = forward.abstract_batch(config)
    rows = math.prod(batch.text_tokens.shape) / config.batch_size  # text positions an image
    image, decoder = config.model.image, config.model.decoder
    tokens = image.class_token + image.registers + forward.patches_seen(config)
    towers = [(image, tokens), (config.model.text, rows)]
    if decoder is not None:
        towers.append((decoder, decoder.queries + 1))
    width = sum(tower.depth * positions * tower.width for tower, positions in towers)
    itemsize = jnp.dtype(config.dtype).itemsize
    return 4 * sum(tower.depth for tower, _ in towers), round(4 * width * images * itemsize)
