"""Trains steps of a run again and compares: batches, states and losses."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.convert import initialise
from grain_jax.core import errors
from grain_jax.input_pipeline import device, order, sources
from grain_jax.runtime import checkpoint, digests, receipt
from grain_jax.training import sharding, train_step
from grain_jax.verify.workdir import Kept, Mismatch, Told, say, steps_in_words

# The largest difference of a loss term, as a share of the loss, that rounding on another mesh explains.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
# Steps for which that holds; later, training has made the difference larger (1e-3 after 124 steps of a tiny
# model on 1 and on 4 devices), and the losses are printed without a judgement.
HORIZON = 50


def check_checkpoints(run: Told, place: "Place") -> None:
    """Raises Mismatch where a kept checkpoint holds another state than its record says."""
    for step, kept in sorted(run.kept.items()):
        program = place.program(kept.config, kept.record)
        state = _restore(kept, program)
        if wrong := receipt.contradictions(kept.record, state):
            what = f"holds another state than was saved ({', '.join(wrong)})"
            raise Mismatch(f"checkpoint {step}: {what}")
        saved = f"the state that was saved (params {kept.record['state']['params']})"
        say(f"checkpoint {step}", f"{saved} on {_where(kept.record)}")


def _restore(kept: Kept, program: train_step.Program) -> train_step.TrainState:
    """The state of a checkpoint, as it is stored. Raises Mismatch."""
    try:
        placed = checkpoint.placed(program.state, program.shardings)
        return checkpoint.restore(kept.folder, checkpoint.held(placed, kept.config))
    except Exception as error:  # whatever a reader makes of bytes that nobody wrote
        first = " ".join(str(error).split())[:200]
        raise Mismatch(f"checkpoint {kept.folder.name}: cannot be read ({first})") from None


class Place:
    """Builds the programs of the records on the devices of this machine, and keeps the last one."""

    def __init__(self):
        self._programs: dict[tuple[str, str], train_step.Program] = {}

    def program(self, config: config_lib.Config, record: Mapping[str, Any]) -> train_step.Program:
        """That of the run on `mesh`."""
        mesh = self.mesh(config, record)
        key = (receipt.config_sha256(config), str(mesh.shape))
        if key not in self._programs:
            examples = sources.open_source(config).num_examples(config)
            total, per_epoch = train.resolve_steps(config, examples)
            program = train_step.build(config, mesh, total_steps=total, steps_per_epoch=per_epoch)
            self._programs = {key: program}
        return self._programs[key]

    def mesh(self, config: config_lib.Config, record: Mapping[str, Any]) -> jax.sharding.Mesh:
        """The recorded mesh, else one over all local devices, else one device."""
        devices = jax.devices()
        others = [dict(data=count, fsdp=1, tensor=1) for count in (len(devices), 1)]
        for sizes in (record["mesh"], *others):
            count = math.prod(sizes.values())
            if count > len(devices):
                continue
            options = dataclasses.replace(config.mesh, dcn_data=1, **sizes)
            mesh = sharding.make_mesh(options, devices[:count])
            try:
                sharding.check_batch(config, mesh)
            except sharding.ShardingError:
                continue
            return mesh
        raise AssertionError("one device always fits")

    def batches(
        self, config: config_lib.Config, program: train_step.Program, step: int
    ) -> device.Prefetch:
        """The batches of the run from `step` on, placed as `program` takes them."""
        assert config.input.lanes is not None  # a run stores the derived number
        lanes = sharding.lanes_of_process(
            program.batch_sharding,
            batch_size=config.batch_size,
            lanes=config.input.lanes,
            process_index=0,
        )
        assert program.config.total_steps is not None
        of_steps = order.with_steps(config, program.config.total_steps)
        batches = sources.open_source(config).batches(of_steps, lanes=lanes, start_step=step)
        return device.Prefetch(batches, program.batch_sharding)


def _where(record: Mapping[str, Any]) -> str:
    mesh = " x ".join(str(size) for size in record["mesh"].values())
    count = record["processes"]
    return f"mesh {mesh}" + (f" of {count} processes" if count > 1 else "")


def replay(run: Told, place: Place, first: int, last: int) -> str:
    """Trains steps first + 1 .. last again and compares; returns the verdict in words.

    Raises:
      Mismatch: other batches, or parameters or losses that rounding does not explain.
      UserError: the data or the config of these steps is missing.
    """
    again = _Replay(run, place, first)
    for end in sorted({r["step"] for r in run.records if first < r["step"] < last} | {last}):
        again.to(end)
    return again.proved()


class _Replay:
    """Trains the run again from a step on, from one record to the next.

    Every restart resumes at a saved step, so that the config, mesh and versions of a record hold for all steps
    since the record before it.
    """

    def __init__(self, run: Told, place: Place, first: int):
        self.run, self.first, self.step = run, first, first
        self._records = {record["step"]: record for record in run.records}
        configs = [run.config, *(kept.config for kept in run.kept.values())]
        self._configs = {receipt.config_sha256(config): config for config in configs}
        self._place = place
        self._state: train_step.TrainState | None = None  # before the first step
        self._exact = True  # so far, mesh and versions are as recorded
        self._equal_at: list[int] = []  # steps whose states are equal bit for bit
        self._rounded_at: list[int] = []  # steps whose states are not, for a reason
        self._reasons: list[str] = []
        self._errors: dict[int, float] = {}  # of the losses, by step

    def to(self, end: int) -> None:
        """Trains up to `end` and compares. Raises as `replay`."""
        record = next((r for r in self.run.records if r["step"] >= end), None)
        config = self._configs.get(record["config"]) if record else self.run.config
        if config is None:
            raise errors.UserError(
                f"{steps_in_words(self.step + 1, end)}: no kept checkpoint has the config of these steps; take --from"
                f" a later checkpoint, or --steps {self.step - self.first} to stop before"
            )
        record = record or self.run.records[-1]
        program = self._place.program(config, record)
        state = self._first_state(config, program) if self._state is None else self._state
        state = jax.device_put(state, program.shardings)
        here = receipt.environment(config)
        now = {"mesh": receipt.axes(self._place.mesh(config, record)), "processes": 1}
        then = record | record["environment"]
        self._reasons += [
            f"{key}: {value}, then {then.get(key)}"
            for key, value in (now | here).items()
            if value != then.get(key)
        ]
        self._exact = self._exact and not self._reasons
        say(f"{steps_in_words(self.step + 1, end)} again", f"on {_where(now)}")

        of_key = {phase.key: phase for phase in program.phases}
        compiled = functools.cache(
            lambda key: of_key[key].step.lower(program.state, of_key[key].batch).compile()
        )
        batches, found = self._place.batches(config, program, self.step), {}
        try:
            for step in range(self.step + 1, end + 1):
                state, metrics = compiled(program.phase(step - 1).key)(state, next(batches))
                self._same_batches(step, state)
                if step in self.run.metrics:
                    found[step] = _loss_error(metrics, self.run.metrics[step])
        finally:
            batches.close()
        self.step, self._state = end, state
        held = checkpoint.held(state, config)
        bits = digests.of_state(held) if end in self._records else {}
        equal = bool(bits) and self._same_state(self._records[end], bits, here["platform"])
        limit = 0.0 if equal else TOLERANCE[config.dtype]
        for step, error in found.items():
            if self._judged(step) and not error <= limit:
                raise Mismatch(
                    f"step {step}: metrics.jsonl has other losses than this run: they differ by {error:.1e} of"
                    f" the loss, expected at most {limit:g}"
                )
        self._errors |= found

    def _first_state(self, config: config_lib.Config, program) -> train_step.TrainState:
        if kept := self.run.kept.get(self.first):
            state = _restore(kept, program)
        else:
            state = initialise.state_of_step_0(
                config, program, lambda line: say("the towers", line)
            )
        return state

    def _same_batches(self, step: int, state: train_step.TrainState) -> None:
        there = self._records.get(step) or self.run.metrics.get(step)
        if there is None:
            return
        chains = digests.chains(state.receipt)
        if chains["batch_chain"] != there.get("batch_chain"):
            raise Mismatch(
                f"step {step}: the run has seen other batches by then: another seed, other records or"
                " another order"
            )
        if chains["pixel_chain"] != there.get("pixel_chain"):
            what = f"step {step}: the run has seen other images by then"
            if self._exact:
                raise Mismatch(f"{what}, though versions and machine are the same")
            if not any("images" in reason for reason in self._reasons):
                self._reasons.append(f"{what}, or they are decoded in another way here")

    def _same_state(
        self, record: Mapping[str, Any], bits: Mapping[str, str], platform: str
    ) -> bool:
        parts = [part for part in bits if bits[part] != record["state"].get(part)]
        if not parts:
            self._equal_at.append(record["step"])
            return True
        if self._exact and platform != "gpu":  # whose sums are in no fixed order
            raise Mismatch(
                f"step {record['step']}: training again gives other {' and '.join(parts)} than recorded,"
                " though mesh and versions are the same: a checkpoint, the config or the code was changed"
            )
        self._exact = False
        self._rounded_at.append(record["step"])
        return False

    def _judged(self, step: int) -> bool:
        """Whether the losses of `step` are judged: equal bits follow, or it is near enough to the start."""
        return step <= max(self._equal_at, default=0) or step - self.first <= HORIZON

    def proved(self) -> str:
        """Prints the comparisons and returns the verdict in words."""
        beyond = {s: e for s, e in self._errors.items() if not self._judged(s)}
        worst = max((e for s, e in self._errors.items() if s not in beyond), default=None)
        say("  batches", "equal")
        if self._equal_at:
            say("  states", f"equal bit for bit at step {_list(self._equal_at)}")
        if self._rounded_at:
            say(
                "  states",
                f"not equal bit for bit at step {_list(self._rounded_at)}, as expected:",
            )
            for reason in dict.fromkeys(self._reasons or ["sums on a GPU are in no fixed order"]):
                say("", f"  {reason}")
        if worst is not None:
            how = "equal" if worst == 0 else f"differ by at most {worst:.1e} of the loss"
            say("  losses", f"{len(self._errors) - len(beyond)} lines, {how}")
        if beyond:
            what = f"up to {max(beyond.values()):.1e}, not judged: after {HORIZON} steps, rounding has grown"
            say("", f"  {steps_in_words(min(beyond), max(beyond))}: {what}")
        if self._equal_at and not self._rounded_at:
            return "the same batches, and the same parameters bit for bit"
        if worst is not None:
            return f"the same batches, and the same losses to {worst:.1e} (rounding)"
        return "the same batches; no losses were logged that could be compared"


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _loss_error(metrics: Mapping[str, Any], line: Mapping[str, Any]) -> float:
    """The largest difference of a loss term, as a share of the logged loss."""
    scale = max(abs(line["loss"]), 1e-9)
    terms = [name for name in metrics if name == "loss" or name.startswith("loss_")]
    return max(abs(float(metrics[term]) - line[term]) for term in terms) / scale
