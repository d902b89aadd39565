"""What a run writes and says: metrics, results of evaluations, the report."""

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence

import jax
from etils import epath
from jax.experimental import multihost_utils

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import atomic, errors, low_rank, metrics_file
from grain_jax.evaluate import encode, tables
from grain_jax.evaluate.base import Context, Evaluator
from grain_jax.evaluate.report import page
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain, lora
from grain_jax.runtime import processes
from grain_jax.train import flops, forward, goodput, metrics_writer, schedule, train_step
from grain_jax.train.set_up import SetUp


class Journal:
    """What a run writes and says. All processes have one; the first alone has a metrics writer.

    Attributes:
      results: numbers of the last evaluation; {} before the first.
    """

    def __init__(self, run: SetUp, workdir: epath.Path, state: train_step.TrainState, clock: goodput.Clock):
        config, start_step = run.config, int(state.step)
        self._clock, self._measured = clock, (start_step, clock.stepping(), 0.0)
        self.results: dict[str, float] = {}
        self._run, self._config, self._workdir = run, config, workdir
        self._terms = [term.metric for term, _ in run.terms]
        self._last_good_step, self._saved = start_step, time.monotonic()
        self._log = None
        if jax.process_index() == 0:
            atomic.write_text(workdir / "config.json", config_lib.to_json(config))
            tokenizer.keep_copy(config.model.text, workdir)
            clock.resume_from(metrics_file.read(workdir), start_step)
            peak = flops.peak_flops(jax.devices()[0].device_kind, config.dtype)
            self._log = metrics_writer.MetricsWriter(
                workdir,
                start_step,
                run.total_steps,
                config.batch_size,
                peak_flops=peak and peak * jax.device_count(),
                flops_per_image=flops.per_image(config).train,
                config=config,
                terms={term.metric: (term.short, weight) for term, weight in run.terms},
            )
        counts = last_text_counts(state, self._log.lines() if self._log else [])
        self._text_counts = metrics_writer.TextCounts(counts, config.text.max_dropped_share)
        self._advice = functools.partial(row_advice, config)

    def say(self, text: str) -> None:
        """Prints a line above the progress line; of several processes, the first does."""
        if self._log:
            self._log.say(text)

    def say_what_runs(self, state: train_step.TrainState) -> None:
        """Prints the devices, the mesh, the size of the model and of the run."""
        run, start_step = self._run, int(state.step)
        if run.derived_from:
            self.say(run.derived_from)
        millions = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
        self.say(
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(run.mesh.shape)},"
            f" {millions:.1f}M parameters{self._of_factors(state)}, {run.total_steps} steps of {self._config.batch_size} images"
            + (f", resumed at step {start_step}" if start_step else "")
        )

    def _of_factors(self, state: train_step.TrainState) -> str:
        """How many parameters are factors of LoRA, in words; "" without."""
        named = grain.flat(state.params).items()
        count = sum(x.size for name, x in named if name.endswith((low_rank.A, low_rank.B)))
        return f" ({count / 1e6:.2f}M of LoRA)" if count else ""

    def pause(self) -> contextlib.AbstractContextManager:
        """What happens inside is left out of the rates."""
        return self._log.pause() if self._log else contextlib.nullcontext()

    def minutes_are_over(self, minutes: float) -> bool:
        """Whether the last save is so many minutes ago, by the first process's clock; a collective."""
        return processes.of_first(lambda: time.monotonic() - self._saved > 60 * minutes)

    def finite(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """The numbers of a step. Raises NotFinite: a loss or the gradient is not; such a state is never saved."""
        with self._clock.waiting():
            values = {name: float(value) for name, value in metrics.items()}
        metrics_writer.check_finite(values, self._last_good_step, step, self._terms)
        self._last_good_step = step
        return values

    def measure(self, step: int, values: dict[str, float], waited: float, late: float) -> dict[str, float]:
        """The `values` with what was measured since the last line, which the progress line shows.

        Args:
          step: steps done.
          values: of the step.
          waited: seconds waited for input since the start.
          late: seconds in which this process stood still since the start.
        """
        values = values | self._text_counts.add(values)
        before, self._measured = self._measured, (step, self._clock.stepping(), late)
        steps, seconds, stood = (x - y for x, y in zip(self._measured, before))
        own = goodput.Own(max(seconds, stood) / max(steps, 1), *goodput.memory_of_devices())
        values |= goodput.of_processes(own)
        if self._log:
            values |= self._log.rates(step, waited)
            self._log.progress(step, values)
        return values

    def evaluate(self, state: train_step.TrainState) -> dict[str, float]:
        """The numbers of the run's evaluators for this state."""
        self.results = evaluate_all(self._config, self._run.evals, state)
        if self.results and schedule.best_is_evaluated(self._config):
            schedule.check_best_metric(self._config, self.results)
        return self.results

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl, and warns. Raises TextsLost: too many texts do not fit into their rows."""
        if self._log:
            self._log.write(step, values | self._clock.numbers())
        if warning := self._text_counts.check(step, self._advice):
            self.say(warning)
        if warning := goodput.warning(values):
            self.say(f"step {step}: {warning}")

    def flush(self) -> None:
        """Brings the files up to date before a save, so that what is restored has its lines."""
        self._saved = time.monotonic()
        if self._log:
            self._log.flush()

    def close(self) -> None:
        """Ends the metrics' files."""
        if self._log:
            self._log.close()

    def report(self, state: train_step.TrainState) -> None:
        """After the last step: evaluates if it was not done, prints the table, writes results.json and report.html."""
        config, workdir = self._config, self._workdir
        if not self.results:  # the run was complete already
            with self._clock.spend("evaluate"):
                self.evaluate(state)
        predictor = make_predictor(config, state)
        if jax.process_index() > 0:
            return
        if self.results:
            atomic.write_text(workdir / "results.json", json.dumps(self.results, indent=2) + "\n")
            kinds = {name: entry["kind"] for name, entry in config.evals.items()}
            numbers = tables.by_evaluation(self.results).items()
            print(tables.describe({name: (kinds[name], of) for name, of in numbers}))
        page.write(workdir, predictor, model=bool(config.report_images))
        print(f"time: {self._clock.words()}", file=sys.stderr)
        print(f"Everything of this run is in {workdir}", file=sys.stderr)


def last_text_counts(state: train_step.TrainState, lines: Sequence[str]) -> dict[str, float]:
    """`metrics_writer.TextCounts.NAMES` at the last line of the first process, or in `state` where there is none."""
    names = metrics_writer.TextCounts.NAMES
    counts = (state.text_counts[0], state.texts_dropped, state.text_counts[1])
    of_state: dict[str, float] = {name: int(count) for name, count in zip(names, counts)}
    last = json.loads(lines[-1]) if lines else {}
    known = all(isinstance(last.get(n), (int, float)) and math.isfinite(last[n]) for n in names)
    return processes.of_first(lambda: {n: last[n] for n in names} if known else of_state)


def row_advice(config: config_lib.Config) -> str:
    """What to set where too many texts do not fit."""
    group, rows = config.text_layout
    return f"set --config.text.pack_rows={rows + 1 + rows // 8} (got {rows}, for groups of {group})"


def make_predictor(config: config_lib.Config, state: train_step.TrainState) -> inference.Predictor:
    """The state's model (the average where one is kept) for evaluation, whole on every process; factors are folded in."""
    params = forward.without_terms(state.ema_params or state.params)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return inference.Predictor(config.model, lora.merged(params, config.optim.lora))


def evaluate_all(
    config: config_lib.Config, evals: Mapping[str, Evaluator], state: train_step.TrainState
) -> dict[str, float]:
    """The numbers of the evaluators `evals`; the processes share the images, and all get the numbers."""
    results = {}
    with errors.out_of_memory_in_a_line("evaluation", lambda: encode.SMALLER):
        predictor = make_predictor(config, state)
        for name, entry in evals.items():
            numbers = tables.scalars(entry.evaluate(predictor, Context(encode.BATCH_SIZE)))
            results |= {f"eval/{name}/{key}": value for key, value in numbers.items()}
    return results
