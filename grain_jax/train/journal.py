"""What a run writes and prints about its steps: metrics, warnings, the table and the report at the end."""

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import atomic, errors, low_rank, metrics_file
from grain_jax.evaluate import encode, tables
from grain_jax.evaluate.base import Evaluator
from grain_jax.evaluate.report import page
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain, lora
from grain_jax.runtime import processes
from grain_jax.train import faults, flops, forward, goodput, metrics_writer, rates, train_step
from grain_jax.train.set_up import SetUp


class Journal:
    """What a run writes after its steps. All processes have one; the first alone writes and prints."""

    def __init__(self, run: SetUp, workdir: epath.Path, state: train_step.TrainState, clock: goodput.Clock):
        config, start_step = run.config, int(state.step)
        self._run, self._config, self._workdir, self._clock = run, config, workdir, clock
        self._own = (time.monotonic(), start_step, clock.waited, 0.0)
        self._terms = [term.metric for term, _ in run.terms]
        self._last_good_step = start_step
        self._writer = None
        if jax.process_index() == 0:
            atomic.write_text(workdir / "config.json", config_lib.to_json(config))
            tokenizer.keep_copy(config.model.text, workdir)
            clock.resume_from(metrics_file.read(workdir), start_step)
            self._writer = metrics_writer.MetricsWriter(workdir, start_step, config)
        peak = flops.peak_flops(jax.devices()[0].device_kind, config.dtype)
        self._rates = rates.Rates(
            start_step,
            run.total_steps,
            config.batch_size,
            peak_flops=peak and peak * jax.device_count(),
            flops_per_image=flops.per_image(config).train,
            terms={term.metric: (term.short, weight) for term, weight in run.terms},
        )
        self.pause = self._rates.pause
        counts = last_text_counts(state, self._writer.last() if self._writer else {})
        self._text_counts = faults.TextCounts(counts, config.text.max_dropped_share)
        self._advice = functools.partial(row_advice, config)

    def say(self, text: str) -> None:
        """Prints a line above the progress line; of several processes, the first does."""
        if self._writer:
            self._rates.say(text)

    def say_what_runs(self, state: train_step.TrainState) -> None:
        """Prints the devices, the mesh, the size of the model and of the run."""
        run, start_step = self._run, int(state.step)
        if run.derived_from:
            self.say(run.derived_from)
        millions = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
        self.say(
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(run.mesh.shape)},"
            f" {millions:.1f}M parameters{_of_factors(state)},"
            f" {run.total_steps} steps of {self._config.batch_size} images"
            + (f", resumed at step {start_step}" if start_step else "")
        )

    def read(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """The numbers of a step, when the devices are done. Raises faults.NotFinite."""
        with self._clock.waiting():
            values = {name: float(value) for name, value in metrics.items()}
        faults.check_finite(values, self._last_good_step, step, self._terms)
        self._last_good_step = step
        return values

    def rates(self, step: int, values: Mapping[str, float], batches: Any, late: float) -> dict[str, float]:
        """What a line has beside its step's numbers `values`; shown in the progress line; a collective.

        `late`: seconds in which this process stood still, in all.
        """
        more = self._text_counts.add(values) | goodput.of_processes(self._own_numbers(step, late))
        if self._writer:
            more |= self._rates.since_last(step, batches.wait_seconds)
            self._rates.show(step, {**values, **more})
        return more

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is no part of a step, when the processes are compared."""
        measured = time.monotonic()
        yield
        began, *others = self._own
        self._own = began + time.monotonic() - measured, *others

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the line of a step, and prints what it warns of. Raises faults.TextsLost."""
        if self._writer:
            self._writer.write(step, {**values, **self._clock.numbers()})
        if warning := self._text_counts.check(step, self._advice):
            self.say(warning)
        if warning := goodput.warning(values):
            self.say(f"step {step}: {warning}")

    def flush(self) -> None:
        """Brings the files up to date, before a checkpoint."""
        if self._writer:
            self._writer.flush()

    def _own_numbers(self, step: int, late: float) -> goodput.Own:
        """This process since its last call."""
        began, first, waited, late_before = self._own
        self._own = time.monotonic(), step, self._clock.waited, late
        seconds = max(self._own[0] - began - (self._clock.waited - waited), late - late_before)
        return goodput.Own(seconds / max(step - first, 1), *goodput.memory_of_devices())

    def close(self) -> None:
        """Ends the metrics' files."""
        if self._writer:
            self._writer.close()

    def report(self, state: train_step.TrainState, results: Mapping[str, float]) -> None:
        """After the last step: prints the table of `results`, writes results.json and report.html."""
        config, workdir = self._config, self._workdir
        shown = bool(config.report_images)
        predictor = make_predictor(config, state, for_one_process=True) if shown else None
        if jax.process_index() > 0:
            return
        if results:
            atomic.write_text(workdir / "results.json", json.dumps(results, indent=2) + "\n")
            kinds = {name: entry["kind"] for name, entry in config.evals.items()}
            numbers = tables.by_evaluation(results).items()
            print(tables.describe({name: (kinds[name], of) for name, of in numbers}))
        page.write(workdir, predictor, model=shown)
        print(f"time: {self._clock.words()}", file=sys.stderr)
        print(f"Everything of this run is in {workdir}", file=sys.stderr)


def _of_factors(state: train_step.TrainState) -> str:
    """How many parameters are factors of LoRA, in words; "" without."""
    named = grain.flat(state.params).items()
    count = sum(x.size for name, x in named if name.endswith((low_rank.A, low_rank.B)))
    return f" ({count / 1e6:.2f}M of LoRA)" if count else ""


def last_text_counts(state: train_step.TrainState, last: Mapping[str, Any]) -> dict[str, float]:
    """`faults.TextCounts.NAMES` in the `last` line of the first process, or in `state` where it has none."""
    names = faults.TextCounts.NAMES
    counts = (state.text_counts[0], state.texts_dropped, state.text_counts[1])
    of_state: dict[str, float] = {name: int(count) for name, count in zip(names, counts)}
    known = all(isinstance(last.get(n), (int, float)) and math.isfinite(last[n]) for n in names)
    return processes.of_first(lambda: {n: last[n] for n in names} if known else of_state)


def row_advice(config: config_lib.Config) -> str:
    """What to set where too many texts do not fit."""
    group, rows = config.text_layout
    return f"set --config.text.pack_rows={rows + 1 + rows // 8} (got {rows}, for groups of {group})"


def make_predictor(
    config: config_lib.Config, state: train_step.TrainState, *, for_one_process: bool = False
) -> inference.Predictor:
    """The state's model to evaluate, sharded as in training: the average, if kept; factors folded in.

    One that runs on several processes takes all of them, in lockstep, unless it is `for_one_process`.
    """
    params = lora.merged(forward.without_terms(state.ema_params or state.params), config.optim.lora)
    if for_one_process and jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return inference.Predictor(config.model, params)


def evaluate_all(
    config: config_lib.Config, evals: Mapping[str, Evaluator], state: train_step.TrainState
) -> dict[str, float]:
    """The numbers of the evaluators `evals`; the processes share the images, and all get the numbers."""
    results = {}
    with errors.out_of_memory_in_a_line("evaluation", lambda: encode.SMALLER), processes.lockstep():
        predictor = make_predictor(config, state)
        for name, entry in evals.items():
            numbers = tables.scalars(entry.evaluate(predictor))
            results |= {f"eval/{name}/{key}": value for key, value in numbers.items()}
    return results
