"""Our train step on one device and the synthetic source, for `benchmarks.train_step` and `benchmarks.variants`."""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from grain_jax import losses, train
from grain_jax.core import schema
from grain_jax.input_pipeline import device, synthetic
from grain_jax.models.grain import GRAIN
from grain_jax.training import sharding, train_step

# Images a group -> rows that hold 99.9% of the texts (docs/speed.md, Packing).
PACKED_ROWS = {8: 5, 16: 9, 32: 17, 64: 33, 128: 63}


def make_config(size: str, batch: int, *, packed: bool = True, **changes: Any) -> Any:
    """The recipe at that size, on one device and the synthetic source, its texts packed or padded."""
    group = min(batch, 128)
    rows = {"text.pack_group": group, "text.pack_rows": PACKED_ROWS[group]} if packed else {}
    keys = {"batch_size": batch, "input.source": "synthetic", "mesh.data": 1}
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return harness.config(size, keys | rows | {"text.packing": packed, "dtype": dtype} | changes)


class TrainStep:
    """The compiled step of the trainer on the first device, with a synthetic batch; a call does a step.

    Args:
      config: for one device.
      held: a list with the state, which steps of one model may share; empty for a fresh one.
    """

    def __init__(self, config: Any, held: list | None = None):
        chip = jax.devices()[0]
        if chip.platform == "cpu":
            train.keep_freed_memory()
        mesh = sharding.make_mesh(config.mesh, [chip])
        self.program = train_step.build(config, mesh, total_steps=1000, steps_per_epoch=100.0)
        self._step = self.program.step.lower(self.program.state, self.program.batch).compile()
        batch = next(synthetic.batches(config))
        self.batch = device.shard_batch(batch, self.program.batch_sharding)
        self.held = [] if held is None else held
        if not self.held:
            self.held.append(self.program.init())

    def __call__(self) -> dict[str, Any]:
        """Returns the metrics, still on the device."""
        self.held[0], metrics = self._step(self.held[0], self.batch)
        return metrics

    def loss(self) -> float:
        """Does a step and waits for its loss."""
        return float(self()["loss"])


def side(size: str, batch: int, attention: str, steps: int) -> dict[str, Any]:
    """{variant: callable that does `steps` steps}, and "dropout off": the loss without a step."""
    held: list = []
    chip = jax.devices()[0]
    ways = ("packed", "padded") if chip.platform == "cpu" else ("packed",)
    make = functools.partial(make_config, size, batch, **{"model.attention": attention})
    made = {name: TrainStep(make(packed=name == "packed"), held) for name in ways}
    config = make()
    model = GRAIN(config.model, config.dtype, config.remat)

    def loss(params, batch):
        outputs = model.apply({"params": params}, batch, None)
        return losses.total_loss(outputs, batch, config.loss).total

    def turn(step: TrainStep) -> dict[str, Any]:
        for _ in range(steps):
            metrics = step()
        jax.block_until_ready((metrics, held))
        peak = (chip.memory_stats() or {}).get("peak_bytes_in_use")
        return dict(loss=float(metrics["loss"]), peak_bytes=peak)

    before = dict(loss=float(jax.jit(loss)(held[0].params, made["packed"].batch)))
    turns = {name: functools.partial(turn, step) for name, step in made.items()}
    return {"dropout off": lambda: before} | turns


def text_places(batch: schema.Batch) -> np.ndarray:
    """Positions of the end tokens in the concatenated rows of the batch, int64 [N]: captions, then real descriptions."""
    groups, rows, length = batch.text_tokens.shape
    group = np.arange(len(batch.image))[:, None] // (len(batch.image) // groups)
    place = lambda at: (group * rows + at[..., 0]) * length + at[..., 1]
    captions = place(batch.caption_at[:, :1])[:, 0]
    descriptions = place(batch.description_at)[batch.region_mask]
    return np.concatenate([captions, descriptions]).astype(np.int64)


def padded_tokens(batch: schema.Batch) -> np.ndarray:
    """The same texts, one a row, int32 [N, L], zeros after the end."""
    length = batch.text_tokens.shape[-1]
    flat_tokens, flat_positions = batch.text_tokens.reshape(-1), batch.text_positions.reshape(-1)
    ends = text_places(batch)
    out = np.zeros((len(ends), length), np.int32)
    for row, end in zip(out, ends):
        count = flat_positions[end] + 1
        row[:count] = flat_tokens[end + 1 - count : end + 1]
    return out
