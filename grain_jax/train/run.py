"""The trainer: grain-jax train --config FILE|NAME --workdir DIR [--config.a.b=value ...]

`_train` is a run from top to bottom. The same command again resumes from the last checkpoint: the order of the
data is a function of the step (docs/method.md, Order of the data), so a checkpoint needs no position in the data.
After SIGTERM or Ctrl-C the run saves and ends with status 75 or 130 (ending.py), after a second one without
saving. One trainer at a time has a workdir (lock.py). A run that does no step for long ends itself (ending.py).
"""

import contextlib
import ctypes
import functools
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils

from grain_jax import config as config_lib
from grain_jax import inference, losses
from grain_jax.checkpoint import files, states
from grain_jax.cli import process
from grain_jax.config import loading
from grain_jax.core import atomic, errors, low_rank, progress
from grain_jax.evaluate import encode, kinds, suite, tables
from grain_jax.evaluate.base import Context, Evaluator
from grain_jax.evaluate.report import page
from grain_jax.input_pipeline import derived, device, sources, tokenizer
from grain_jax.models import attention, grain, lora, placement
from grain_jax.runtime import compiled, distributed, ending, lock, processes
from grain_jax.train import (
    flops,
    forward,
    initialise,
    memory_check,
    metrics_writer,
    profiling,
    schedule,
    sharding,
    train_step,
)
from grain_jax.train.arguments import Train


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it to the kernel.

    XLA's CPU backend allocates its temporaries anew at every step: half of the demo's step on two cores. Other systems
    and allocators have no such switch and need none.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)


def prepare_missing_data(config: config_lib.Config, handler: ending.PreemptionHandler) -> None:
    """Runs `input.prepare` where a record set is missing.

    Only the trainer calls this, with the config that its user passed: a stored config may come from anyone.
    """
    if jax.process_index() == 0 and config.input.prepare:
        try:
            sources.open_source(config)
        except errors.MissingData:
            words = shlex.split(config.input.prepare)
            command = ["python", "-m", *(word.format(**vars(config.input)) for word in words)]
            tell(f"No data set yet: {shlex.join(command)}")
            with subprocess.Popen([sys.executable, *command[1:]]) as handler.child:
                status = handler.child.wait()
            handler.child = None
            if status:
                told = f"input.prepare: {shlex.join(command)} ended with {status}"
                raise errors.UserError(told) from None
    processes.wait_for_all("data set prepared")


def derive(
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    source: sources.DataSource,
    workdir: epath.Path,
) -> tuple[config_lib.Config, str]:
    """The config with the numbers that it leaves open (derived.py), and a line about them.

    The first process works them out, from the newest checkpoint's config that can be read where there is one.

    Raises:
      DerivedError: no numbers will do. DataError: a record cannot be read.
    """
    if not derived.is_open(config):
        return config, ""

    def resolve():
        stored, where = states.newest_config(workdir)
        place = derived.Place(
            sharding.batch_shards(mesh),
            sharding.lanes_needed(sharding.batch_sharding(mesh), config.batch_size),
            source.num_shards(config),
        )
        lengths = lambda: source.text_lengths(config)
        found, line = derived.resolve(config, place, lengths, stored, where)
        return (found.input.lanes, found.text.pack_group, found.text.pack_rows), line

    numbers, line = processes.of_first(resolve)
    return derived.with_numbers(config, *numbers), line


def resolve_steps(config: config_lib.Config, num_examples: int) -> tuple[int, float]:
    """(total steps, steps an epoch); of a mixture, an epoch is as many records as all sets have."""
    steps_per_epoch = num_examples / config.batch_size
    total = config.total_steps
    if total is None:
        total = round((config.total_epochs or 0) * steps_per_epoch)
        if total < 1:
            raise errors.UserError(
                f"total_epochs: {config.total_epochs} of {num_examples} examples are no whole batch of"
                f" {config.batch_size}; set total_steps, or a smaller batch_size"
            )
    return total, steps_per_epoch


def train(
    config: config_lib.Config,
    workdir: epath.Path,
    handler: ending.PreemptionHandler | None = None,
    watch: ending.Watchdog | None = None,
) -> None:
    """One run, from the newest checkpoint of its workdir to its last step, or to the one where `handler` ends it.

    `watch` ends the process where no step is done for long.

    Raises:
      UserError: the input, the workdir or the disk does not allow the run.
      NotFinite: a loss is NaN or infinite.
      SystemExit: the run was told to end, and is saved.
    """
    handler, watch = handler or ending.PreemptionHandler(), watch or ending.Watchdog()
    first = jax.process_index() == 0
    with lock.held(workdir) if first else contextlib.nullcontext() as mark:
        with ending.in_a_line(workdir):
            _train(config, workdir, handler, watch, mark)


def _train(
    config: config_lib.Config,
    workdir: epath.Path,
    handler: ending.PreemptionHandler,
    watch: ending.Watchdog,
    mark: lock.Lock | None,
) -> None:
    """`train`, with the lock of the workdir."""
    # 1. Devices and data.
    run = set_up(config, workdir, handler)
    config = run.config

    # 2. Model, optimiser and step, as shapes only.
    program = train_step.build(
        config, run.mesh, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch
    )
    memory_check.check(program)

    # 3. State: the newest checkpoint that is whole, else a fresh start from the seed and `config.init`.
    checkpoints = states.manager(workdir, config)
    state = restore_or_initialise(checkpoints, run, program)
    start_step = int(state.step)
    records = Records(run, workdir, checkpoints, state)
    records.say_what_runs(state)

    # 4. Compile.
    step_fn = compile_step(run, program, records)

    # 5. The loop. After each step `state.step` = `step` steps are done, and batches 0 .. step-1 used.
    on_host = sources.batches_of_run(
        run.source,
        config,
        notes=workdir / "shards",
        lanes=run.lanes,
        start_step=start_step,
    )
    batches = device.Prefetch(on_host, program.batch_sharding)
    trace = profiling.StepTrace(workdir, config.profile_start, config.profile_steps)
    plan = schedule.Schedule(config, run.total_steps, has_evals=bool(run.evals))
    step, preempted = start_step, False
    with handler.training(), contextlib.ExitStack() as closes:
        closes.callback(watch.stop)  # whatever ends the loop, these run from the last to the first
        closes.callback(records.close)
        closes.callback(trace.close)
        closes.callback(checkpoints.close)
        # The save under way is finished.
        waits = "waiting for a checkpoint to be written"
        closes.callback(watch.doing(waits)(checkpoints.wait_until_finished))
        closes.callback(watch.doing("waiting for the input to stop")(batches.close))
        with watch.running(start_step), ending.in_a_line(workdir):
            for step in range(start_step + 1, run.total_steps + 1):
                trace.begin(step)
                with watch.doing("waiting for the next batch (input)"):
                    batch = next(batches)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                trace.end(step, metrics)
                watch.stepped(step)
                if mark:
                    with watch.doing("asking whether the workdir is still its own (trainer.lock)"):
                        mark.check()
                preempted = handler.reached()
                due = plan.due(step, preempted=preempted, minutes_are_over=records.minutes_are_over)
                records.after_step(step, due, state, metrics, batches, watch)
                if preempted:
                    break
    if preempted:
        records.say(
            f"told to end: saved at step {step} of {run.total_steps}; the same command goes on from there"
        )
        sys.exit(handler.status)

    # 6. Final evaluation and report.
    results = records.results
    if not results and run.evals:  # the run was complete already
        results = evaluate_all(config, run.evals, state, workdir)
    predictor = make_predictor(config, state)
    if jax.process_index() == 0:
        report(config, workdir, predictor, results)


class SetUp(NamedTuple):
    """A run before it has a state: what `set_up` finds."""

    config: config_lib.Config  # without open numbers
    derived_from: str  # how the open numbers were derived, or ""
    mesh: jax.sharding.Mesh
    source: sources.DataSource
    lanes: tuple[int, ...]  # of this process
    total_steps: int
    steps_per_epoch: float
    data: list[sources.Identity]
    evals: dict[str, Evaluator]  # whose data is there

    @property
    def terms(self) -> list[losses.LossTerm]:
        """Of its loss."""
        return [term for term, _ in losses.terms_of(self.config.loss)]


def set_up(
    config: config_lib.Config, workdir: epath.Path, handler: ending.PreemptionHandler
) -> SetUp:
    """Opens all that the run needs before anything is computed, and makes the data set where it is missing.

    What needs no data set comes first, since making one takes long.
    """
    losses.terms_of(config.loss)
    evaluators = kinds.from_entries(config.evals, config.model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    metrics_writer.check_wandb(config.wandb)
    if not files.finished_steps(workdir):  # else they are not read
        initialise.check(config.init)
    if config.input.source == "records" or config.evals:
        tokenizer.of_tower(config.model.text)  # raises
    prepare_missing_data(config, handler)
    source = sources.open_source(config)
    config, derived_from = derive(config, mesh, source, workdir)
    assert config.input.lanes is not None  # derived
    sharding.check_batch(config, mesh)
    lanes = sharding.lanes_of_process(
        sharding.batch_sharding(mesh),
        batch_size=config.batch_size,
        lanes=config.input.lanes,
        process_index=jax.process_index(),
    )
    steps = resolve_steps(config, source.num_examples(config))
    data = processes.of_first(lambda: source.identities(config))
    evals = suite.present(evaluators)  # here, not after the last step
    schedule.check_best_entry(config, evals)
    return SetUp(config, derived_from, mesh, source, lanes, *steps, data, evals)


def tell(text: str) -> None:
    """Prints a line; of several processes, the first does."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def restore_or_initialise(checkpoints, run: SetUp, program: train_step.Program):
    """The state of the newest checkpoint that is whole, else of step 0."""
    placed = states.placed(program.state, program.shardings)
    state = states.restore_newest(checkpoints, run.config, placed, tell, run.data)
    return initialise.state_of_step_0(run.config, program, tell) if state is None else state


def compile_step(run: SetUp, program: train_step.Program, records: "Records"):
    """The compiled step; it fits into memory, and measures what the best checkpoint is chosen by."""
    began = time.monotonic()
    with records.pause():
        lowered = program.step.lower(program.state, program.batch)
        if not schedule.best_is_evaluated(run.config):
            schedule.check_best_metric(run.config, lowered.out_info[1])
        usually = "usually under a minute for a small model, 2 to 5 minutes for a large one"
        with progress.while_compiling("the training step", usually, silent=jax.process_index() > 0):
            step_fn = lowered.compile()
    with placement.on(run.mesh, sharding.BATCH_AXES):
        programs = attention.of_towers(run.config.model, run.config.dtype)
    took = progress.duration(time.monotonic() - began)
    records.say(f"compiled in {took}; attention of the towers: {programs}")
    memory_check.check_step(step_fn)
    processes.wait_for_all("compiled")
    return step_fn


class Records:
    """What a run writes after its steps: metrics, evaluations, checkpoints.

    All processes have one; the first alone has a metrics writer.

    Attributes:
      results: numbers of the last evaluation; {} before the first.
    """

    def __init__(self, run: SetUp, workdir: epath.Path, checkpoints, state: train_step.TrainState):
        config, start_step = run.config, int(state.step)
        self.results: dict[str, float] = {}
        self._run, self._config, self._workdir = run, config, workdir
        self._checkpoints, terms = checkpoints, run.terms
        self._terms = [term.metric for term in terms]
        self._last_good_step, self._last_save = start_step, time.monotonic()
        self._log = None
        if jax.process_index() == 0:
            atomic.write_text(workdir / "config.json", config_lib.to_json(config))
            tokenizer.keep_copy(config.model.text, workdir)
            peak = flops.peak_flops(jax.devices()[0].device_kind, config.dtype)
            self._log = metrics_writer.MetricsWriter(
                workdir,
                start_step,
                run.total_steps,
                config.batch_size,
                peak_flops=peak and peak * jax.device_count(),
                flops_per_image=flops.per_image(config).train,
                config=config,
                terms={term.metric: term.short for term in terms},
            )
        self._text_counts = metrics_writer.TextCounts(
            last_text_counts(state, self._lines()), config.text.max_dropped_share
        )
        self._advice = functools.cache(functools.partial(row_advice, config, run.source))

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
        return processes.of_first(lambda: time.monotonic() - self._last_save > 60 * minutes)

    def after_step(self, step: int, due: schedule.Due, state, metrics, batches, watch) -> None:
        """Logs, evaluates and saves what is due.

        Raises:
          NotFinite: a loss or the gradient is not finite; such a state is never saved.
          TextsLost: too many texts do not fit into their rows.
        """
        if not (due.logs or due.saves):
            return
        values = {name: float(value) for name, value in metrics.items()}
        metrics_writer.check_finite(values, self._last_good_step, step, self._terms)
        self._last_good_step = step
        if due.logs:
            values |= self._text_counts.add(values)
        if self._log and due.logs:
            values |= self._log.rates(step, batches.wait_seconds, batches.wait_steps)
            self._log.progress(step, values)
        if due.evaluates:
            with watch.pause(), self.pause():
                self.results = evaluate_all(self._config, self._run.evals, state, self._workdir)
            values |= self.results
            if self.results and schedule.best_is_evaluated(self._config):
                schedule.check_best_metric(self._config, self.results)
        if self._log and due.logs:
            # Before the save: what is restored has its lines.
            with watch.doing("writing metrics.jsonl"):
                self._log.write(step, values)
        if due.logs and (warning := self._text_counts.check(step, self._advice)):
            self.say(warning)
        if due.saves:
            with watch.doing("saving a checkpoint"):
                self._save(state, values)

    def _save(self, state: train_step.TrainState, values: Mapping[str, float]) -> None:
        if self._log:
            self._log.flush()
        best = schedule.best_metric(self._config, values)
        states.save(self._checkpoints, state, self._config, best, self._run.data)
        self._last_save = time.monotonic()

    def _lines(self) -> list[str]:
        return self._log.lines() if self._log else []

    def close(self) -> None:
        """Ends the metrics' files."""
        if self._log:
            self._log.close()


def last_text_counts(state: train_step.TrainState, lines: Sequence[str]) -> dict[str, float]:
    """`metrics_writer.TextCounts.NAMES` at the last line of the first process, or in `state` where there is none."""
    names = metrics_writer.TextCounts.NAMES
    counts = (state.text_counts[0], state.texts_dropped, state.text_counts[1])
    of_state: dict[str, float] = {name: int(count) for name, count in zip(names, counts)}
    last = json.loads(lines[-1]) if lines else {}
    known = all(isinstance(last.get(n), (int, float)) and math.isfinite(last[n]) for n in names)
    return processes.of_first(lambda: {n: last[n] for n in names} if known else of_state)


def row_advice(config: config_lib.Config, source: sources.DataSource) -> str:
    """What to set where too many texts do not fit: rows by the lengths of the data set's texts."""
    group, rows = config.text_layout
    enough = derived.rows_of(config, group, source.text_lengths(config)).rows
    return (
        f"set --config.text.pack_rows={max(enough, rows + 1)} (got {rows}, for groups of {group})"
    )


def make_predictor(config: config_lib.Config, state: train_step.TrainState) -> inference.Predictor:
    """The state's model (the average where one is kept) for evaluation, whole on every process; factors are folded in."""
    params = forward.without_terms(state.ema_params or state.params)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return inference.Predictor(config.model, lora.merged(params, config.optim.lora))


def evaluate_all(
    config: config_lib.Config,
    evals: Mapping[str, Evaluator],
    state: train_step.TrainState,
    workdir: epath.Path,
) -> dict[str, float]:
    """The numbers of the evaluators `evals`; the processes share the images, and all get the numbers."""
    results, step = {}, int(state.step)
    with errors.out_of_memory_in_a_line("evaluation", lambda: encode.SMALLER):
        predictor = make_predictor(config, state)
        for name, entry in evals.items():
            state_path = workdir / "diagnostics" / f"{name}.json"
            context = Context(encode.BATCH_SIZE, state_path, step)
            numbers = tables.scalars(entry.evaluate(predictor, context))
            results |= {f"eval/{name}/{key}": value for key, value in numbers.items()}
    return results


def report(config, workdir, predictor, results) -> None:
    """Prints the final table and writes report.html."""
    if results:
        atomic.write_text(workdir / "results.json", json.dumps(results, indent=2) + "\n")
        kinds = {name: entry["kind"] for name, entry in config.evals.items()}
        numbers = tables.by_evaluation(results).items()
        print(tables.describe({name: (kinds[name], of) for name, of in numbers}))
    page.write(workdir, predictor, model=bool(config.pictures))
    print(f"Everything of this run is in {workdir}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    args = Train.parse(arguments)
    config = loading.load(args.config, args.overrides)
    if args.print_shardings:
        mesh = sharding.make_mesh(config.mesh)
        config, _ = derived.planned(config, derived.Place(sharding.batch_shards(mesh)))
        program = train_step.build(config, mesh, total_steps=1, steps_per_epoch=1.0)
        print(f"mesh {dict(mesh.shape)}")
        print(sharding.table(program.state, program.shardings))
        return
    keep_freed_memory()
    compiled.use()
    handler, watch = ending.PreemptionHandler(), ending.Watchdog(args.stall_seconds)
    handler.listen()
    ending.quiet_threads()
    place = (args.coordinator, args.processes, args.process_id, args.heartbeat_seconds)
    found = distributed.initialize(*place)
    if jax.distributed.is_initialized():
        print(found, file=sys.stderr, flush=True)
    with distributed.ending_together(args.heartbeat_seconds):
        with errors.out_of_memory_in_a_line("training", lambda: memory_check.ADVICE):
            train(config, epath.Path(args.workdir), handler, watch)


def console(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process."""
    ending.run(functools.partial(process.run, main, arguments))
