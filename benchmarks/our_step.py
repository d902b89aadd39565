"""Our train step on one device and the synthetic source, for `benchmarks.train_step`."""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from grain_jax import losses
from grain_jax.core import schema
from grain_jax.input_pipeline import device, synthetic
from grain_jax.models.grain import GRAIN
from grain_jax.train import run, sharding, train_step

# Images a group -> rows that hold 99.9% of the texts (docs/performance.md, Packing).
PACKED_ROWS = {8: 5, 16: 9, 32: 17, 64: 33, 128: 63}


def make_config(size: str, batch: int, *, packed: bool = True, **changes: Any) -> Any:
    """The recipe at that size, on one device and the synthetic source, its texts packed or padded."""
    group = min(batch, 128)
    rows = {"text.pack_group": group, "text.pack_rows": PACKED_ROWS[group]} if packed else {}
    keys = {"batch_size": batch, "input.source": "synthetic", "mesh.data": 1}
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return harness.config(size, keys | rows | {"text.packing": packed, "dtype": dtype} | changes)


def side(size: str, batch: int, attention: str, steps: int) -> dict[str, Any]:
    """{variant: callable that does `steps` steps}, and "dropout off": the loss without a step."""
    run.keep_freed_memory()  # before JAX starts its threads, as a run does
    chip, made = jax.devices()[0], {}
    for name in ("packed", "padded") if chip.platform == "cpu" else ("packed",):
        keys = {"model.attention": attention}
        config = make_config(size, batch, packed=name == "packed", **keys)
        mesh = sharding.make_mesh(config.mesh, [chip])
        program = train_step.build(config, mesh, total_steps=1000, steps_per_epoch=100.0)
        arrays = device.shard_batch(next(synthetic.batches(config)), program.batch_sharding)
        made[name] = program.step.lower(program.state, program.batch).compile(), arrays
    state = [program.init()]  # the state, which the variants share
    model = GRAIN(config.model, config.dtype, config.remat)

    def loss(params, batch):
        outputs = model.apply({"params": params}, batch, None)
        return losses.total_loss(outputs, batch, config.loss).total

    def turn(step, batch) -> dict[str, Any]:
        for _ in range(steps):
            state[0], metrics = step(state[0], batch)
        jax.block_until_ready((metrics, state))
        peak = (chip.memory_stats() or {}).get("peak_bytes_in_use")
        return dict(loss=float(metrics["loss"]), peak_bytes=peak)

    before = dict(loss=float(jax.jit(loss)(state[0].params, made["packed"][1])))
    turns = {name: functools.partial(turn, *step) for name, step in made.items()}
    return {"dropout off": lambda: before} | turns


def text_places(batch: schema.Batch) -> np.ndarray:
    """Positions of the end tokens in the batch's concatenated rows, [N]: captions, then descriptions."""
    groups, rows, length = batch.text_tokens.shape
    group = np.arange(len(batch.image))[:, None] // (len(batch.image) // groups)
    index = lambda at: (group * rows + at[..., 0]) * length + at[..., 1]
    captions = index(batch.caption_at[:, :1])[:, 0]
    descriptions = index(batch.description_at)[batch.region_mask]
    return np.concatenate([captions, descriptions]).astype(np.int64)


def padded_tokens(batch: schema.Batch) -> np.ndarray:
    """The same texts, one per row, int32 [N, L], zeros after the end."""
    length = batch.text_tokens.shape[-1]
    flat_tokens, flat_positions = batch.text_tokens.reshape(-1), batch.text_positions.reshape(-1)
    ends = text_places(batch)
    out = np.zeros((len(ends), length), np.int32)
    for row, end in zip(out, ends):
        count = flat_positions[end] + 1
        row[:count] = flat_tokens[end + 1 - count : end + 1]
    return out
