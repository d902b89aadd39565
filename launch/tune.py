"""Measures a run on this machine and writes the fastest keys: grain-jax tune --config X"""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from grain_jax import config as config_lib
from grain_jax.config import loading
from grain_jax.core import atomic, errors, progress
from grain_jax.input_pipeline import derived, device, sources, synthetic
from grain_jax.launch import chips, hlo, plan
from grain_jax.launch.arguments import Tune
from grain_jax.models.layers import UNROLLED
from grain_jax.runtime import distributed
from grain_jax.train import layer_trials, memory_check, run, sharding, train_step

STEP_SECONDS = 2.0  # for the timing of a step
INPUT_SECONDS = 3.0
GAIN = 0.99  # of the time: slower than this is no gain
Keys = dict[str, Any]  # key of a config -> value


class Tuner:
    """What is measured, and what is fastest so far."""

    def __init__(self, file: str, overrides: Sequence[str]):
        self._file, self._overrides = file, list(overrides)
        self.best: Keys = {}  # of the fastest step
        self.seconds = math.inf  # per step with them; infinite before a step ran
        self._state: Any = None
        self._compiled: Any = None  # the fastest step
        self._source: sources.DataSource | None = None
        self.mesh = sharding.make_mesh(self._loaded({}).mesh)
        sharding.check_batch(self._loaded({}), self.mesh)
        try:
            self._source = sources.open_source(self._loaded({}))
        except errors.UserError as fault:
            print(f"synthetic batches, and no measurement of the input: {fault}")
        self.config = self.with_keys({})
        device_kind = self.mesh.devices.flat[0].device_kind
        print(
            f"{self.mesh.size} {device_kind} device(s), mesh {dict(self.mesh.shape)},"
            f" {self.config.batch_size} images per step, {self.config.dtype}"
        )

    def _loaded(self, keys: Keys) -> config_lib.Config:
        overrides = [f"--config.{key}={value}" for key, value in keys.items()]
        config = loading.load(self._file, [*self._overrides, *overrides])
        return config.with_dtype(jax.default_backend())

    def with_keys(self, keys: Keys) -> config_lib.Config:
        """The config of a run with these keys, without open numbers."""
        config = self._loaded(keys)
        shards = self._source.num_shards(config) if self._source else {}
        limits = derived.Limits(sharding.batch_shards(self.mesh), shards=shards)
        return derived.planned(config, limits)[0]

    def layers(self) -> list[str]:
        """Prints the layers with each program of attention; returns the `model.attention` without a fault."""
        auto = layer_trials.with_attention(self.config, "auto")
        taken, good = layer_trials.taken_by_auto(auto, self.mesh), ["auto", "xla"]
        names = {"xla": "xla"} | ({"auto": f"attention {taken}"} if taken else {})
        images = layer_trials.images_at_once(self.config, self.mesh)
        print(f"a layer, forward and backward, {images} images:")
        for tower in layer_trials.TOWERS:
            trials = layer_trials.compare(self.config, tower, images, [*names])
            for (choice, name), trial in zip(names.items(), trials):
                error = f", differs by {trial.error:.1e}" * (choice != "xla")
                said = trial.fault or f"{trial.seconds * 1e3:.3g} ms{error}"
                print(f"  {tower:5} {name:20} {said}", flush=True)
                if trial.fault and choice == "auto":
                    good = ["xla"]
        return good if taken else good[:1]

    def options(self, programs_of_attention: list[str]) -> list[list[Keys]]:
        """For each key, or group of keys, its values: the present ones first."""
        config, model, shards = self.config, self.config.model, sharding.batch_shards(self.mesh)
        images = config.batch_size // shards
        fixed = {word.removeprefix("--config.").split("=")[0] for word in self._overrides}
        attention = (config.model.attention, *programs_of_attention)
        depths = {f"model.{name}.unroll": getattr(model, name).depth for name in ("image", "text")}
        now = {f"model.{name}.unroll": getattr(model, name).unroll for name in ("image", "text")}
        unrolled = [depths] if max(depths.values()) <= UNROLLED else []
        groups = [
            [{"model.attention": x} for x in attention],
            [{"remat": x} for x in (config.remat, *config_lib.REMAT_POLICIES)],
            [now, dict.fromkeys(depths, 1), *unrolled],
            [{"microbatches": n} for n in (config.microbatches, 1, 2, 4) if images % n == 0],
        ]
        groups = [[x for i, x in enumerate(group) if x not in group[:i]] for group in groups]
        return [group for group in groups if len(group) > 1 and not fixed & set(group[0])]

    def steps(self, groups: list[list[Keys]]) -> None:
        """Times the present keys, then for each group its other values beside the fastest of the others."""
        self.best = {key: value for group in groups for key, value in group[0].items()}
        counter = progress.Counter("steps", 1 + sum(len(group) - 1 for group in groups))
        print("a step:", flush=True)
        try:
            for changes in ({}, *(x for group in groups for x in group[1:])):
                said = self._try(changes)
                counter.close()
                name = " ".join(f"{key}={value}" for key, value in changes.items())
                print(f"  {name or 'as configured':40} {said}", flush=True)
                counter.add()
        finally:
            counter.close()

    def _try(self, changes: Keys) -> str:
        keys = self.best | changes
        try:
            seconds, compiled = self.step(keys)
        except Exception as fault:  # memory, or whatever a compiler raises
            self._state = None  # it was given to the step
            return (str(fault).strip() or repr(fault)).splitlines()[0]
        if better := seconds < GAIN * self.seconds:
            self.best, self.seconds, self._compiled = keys, seconds, compiled
        rate = self.config.batch_size / seconds
        return f"{seconds * 1e3:.4g} ms, {rate:.4g} images/s{', fastest so far' * better}"

    def step(self, keys: Keys) -> tuple[float, jax.stages.Compiled]:
        """The median time of a step with these keys, and the step."""
        config = self.with_keys(keys)
        steps = config.total_steps or max(round((config.total_epochs or 0) * plan.EPOCH), 1)
        built = train_step.build(config, self.mesh, total_steps=steps, steps_per_epoch=plan.EPOCH)
        memory_check.check(built)
        with progress.while_compiling("a step", "up to 5 minutes for a large model", once=True):
            compiled = built.step.lower(built.state, built.batch).compile()
        memory_check.check_step(compiled)
        batch = device.shard_batch(next(synthetic.batches(config)), built.batch_sharding)
        if self._state is None:
            self._state = built.init()

        def call():
            self._state, metrics = compiled(self._state, batch)
            return metrics

        return layer_trials.median_seconds(call, STEP_SECONDS), compiled

    def bound(self) -> str:
        """The fastest step beside the bound of `grain-jax plan`, where the chip is known."""
        kind, count = self.mesh.devices.flat[0].device_kind, self.mesh.size
        chip = chip_of(kind)
        if chip is None:
            return f"plan: no bound, since {kind} is not among its chips"
        topology = chips.Topology(chip, count, (count,), 1)
        module = hlo.parse(self._compiled.as_text())
        work = plan.work(module, topology, self.config, dict(self.mesh.shape), {})
        least = work["roofline"]["step_s"]
        return (
            f"plan: at best {least * 1e3:.4g} ms, bound by {work['roofline']['bound']}; the step takes"
            f" {self.seconds / least:.2f} times that, MFU {work['mfu_at_most'] * least / self.seconds:.1%}"
        )

    def input(self) -> str:
        """The images per second of the input beside what the fastest step needs."""
        needed = self.config.batch_size / self.seconds
        if self._source is None:
            return f"input: not measured; the step needs {needed:.4g} images/s"
        batches = self._source.batches(self.with_keys(self.best))
        next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < INPUT_SECONDS:
            next(batches)
            count += 1
        rate = count * self.config.batch_size / (time.perf_counter() - began)
        said = "enough" if rate >= needed else "TOO FEW: see docs/performance.md, Input"
        return f"input: {rate:.4g} images/s, the step needs {needed:.4g}: {said}"


def chip_of(kind: str) -> chips.Chip | None:
    """The chip of a `jax.Device.device_kind`, if plan knows it."""
    return next((chip for chip in chips.CHIPS.values() if chip.device_kind == kind), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, prints and writes."""
    args = Tune.parse(arguments)
    output = epath.Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    run.keep_freed_memory()
    distributed.keep_compiled_programs()
    tuner, status = Tuner(args.config, args.overrides), 0
    try:
        tuner.steps(tuner.options(tuner.layers()))
        print(tuner.bound(), flush=True)
        print(tuner.input())
    except KeyboardInterrupt:
        print("stopped", flush=True)
        status = 130
    if tuner.seconds == math.inf:
        raise errors.UserError("no step was measured, so nothing is written")
    flags = [f"--config.{key}={value}" for key, value in tuner.best.items()]
    atomic.write_text(output, "".join(f"{flag}\n" for flag in flags))
    print(f"fastest: {tuner.seconds * 1e3:.4g} ms a step with {' '.join(flags)}")
    all_flags = " ".join([f"--config {args.config}", *args.overrides, f"$(cat {args.output})"])
    print(f"train with it: grain-jax train {all_flags} --workdir DIR")
    return status
