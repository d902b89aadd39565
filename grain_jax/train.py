"""The trainer: python -m grain_jax.train --config configs/X.py --workdir DIR [--config.a.b=value ...]

Reads top to bottom. The same command again resumes from the last checkpoint: the order of the data is a
function of the step (docs/method.md, Order of the data), so nothing else is needed to go on as if nothing had happened. After
SIGTERM or Ctrl-C the run saves and ends with status 75 or 130 (preemption.py), at a second one without saving. One
trainer at a time has a workdir (lock.py), and one that does not step ends itself (watchdog.py).
"""

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from grain_jax import config as config_lib
from grain_jax import errors, inference
from grain_jax.convert import initialise
from grain_jax.evaluate import base as evaluate
from grain_jax.files import atomic
from grain_jax.input_pipeline import derived, device, sources, tokenizer
from grain_jax.report import page, pictures
from grain_jax.runtime import (
    checkpoint,
    command_line,
    digests,
    distributed,
    ending,
    lock,
    metrics_writer,
    preemption,
    processes,
    profiling,
    receipt,
    storage_faults,
    watchdog,
)
from grain_jax.training import flops, memory, sharding, train_step

CONFIG = command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: metrics, checkpoints, pictures")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes"
)
PROCESSES = flags.DEFINE_integer("processes", 1, "how many processes there are")
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "which of them this is, from 0")
HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds", 20, "silence after which a process counts as dead and the run ends"
)
STALL_SECONDS = flags.DEFINE_integer(
    "stall_seconds",
    1800,
    "seconds without a step after which the run ends with status 124; 0: never",
)
PRINT_SHARDINGS = flags.DEFINE_bool(
    "print_shardings", False, "print where each array of the state lies, and stop"
)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it to the kernel.

    XLA's CPU backend allocates its temporaries anew at every step, so the kernel would zero and map
    hundreds of megabytes again each time: on two cores that was half of the demo's step. Other
    systems and allocators have no such switch and need none.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)


def prepare_missing_data(config: config_lib.Config, handler: preemption.PreemptionHandler) -> None:
    """Runs `input.prepare` where a record set is missing.

    Only the trainer calls this, with the config that its user passed: a stored config may come from anyone.
    """
    if jax.process_index() == 0 and config.input.prepare:
        try:
            sources.open_source(config)
        except errors.MissingData:
            _run_prepare(config.input, handler)
    wait_for_all("data set prepared")


def _run_prepare(config: config_lib.Input, handler: preemption.PreemptionHandler) -> None:
    command = [word.format(**vars(config)) for word in shlex.split(config.prepare)]
    print(f"No data set yet: python -m {shlex.join(command)}", file=sys.stderr, flush=True)
    with subprocess.Popen([sys.executable, "-m", *command]) as handler.child:
        status = handler.child.wait()
    handler.child = None
    if status:
        raise errors.UserError(
            f"input.prepare: python -m {shlex.join(command)} ended with {status}"
        )


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
        stored, where = checkpoint.newest_config(workdir)
        place = derived.Place(
            sharding.batch_shards(mesh),
            sharding.lanes_needed(sharding.batch_sharding(mesh), config.batch_size),
            source.num_shards(config),
        )
        found, line = derived.resolve(
            config, place, lambda: source.text_lengths(config), stored, where
        )
        return found.input.lanes, found.text.pack_group, found.text.pack_rows, line

    *numbers, line = processes.of_first(resolve)
    return derived.with_numbers(config, *numbers), line


def resolve_steps(config: config_lib.Config, num_examples: int) -> tuple[int, float]:
    """(total steps, steps an epoch); of a mixture, an epoch is as many records as all sets have."""
    steps_per_epoch = num_examples / config.batch_size
    total = config.total_steps
    if total is None:
        total = round(config.total_epochs * steps_per_epoch)
        if total < 1:
            raise errors.UserError(
                f"total_epochs: {config.total_epochs} of {num_examples} examples are no whole batch of"
                f" {config.batch_size}; set total_steps, or a smaller batch_size"
            )
    return total, steps_per_epoch


def train(
    config: config_lib.Config,
    workdir: epath.Path,
    handler: preemption.PreemptionHandler | None = None,
    watch: watchdog.Watchdog | None = None,
) -> None:
    """One run, from where its workdir stands to its last step, or to the one where `handler` ends it.

    `watch` ends the process where the run stands still.

    Raises:
      UserError: the input, the workdir or the disk does not allow the run.
      NotFinite: a loss is not finite any more.
      SystemExit: the run was told to end, and is saved.
    """
    with contextlib.ExitStack() as ends:
        handler, watch = handler or preemption.PreemptionHandler(), watch or watchdog.Watchdog()
        _train(config, workdir, handler, watch, ends)


def _train(
    config: config_lib.Config,
    workdir: epath.Path,
    handler: preemption.PreemptionHandler,
    watch: watchdog.Watchdog,
    ends: contextlib.ExitStack,
) -> None:
    """`train`; what lasts to the end of the run is left to `ends`."""
    # 1. Devices and data.
    main_process = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)  # before the data set is made
    there = memory.limit()
    memory.check(config, mesh, there)
    prepare_missing_data(config, handler)
    source = sources.open_source(config)
    asked = config  # what memory.py suggests values for
    config, derived_from = derive(config, mesh, source, workdir)
    sharding.check_batch(config, mesh)
    lanes = sharding.lanes_of_process(
        sharding.batch_sharding(mesh),
        batch_size=config.batch_size,
        lanes=config.input.lanes,
        process_index=jax.process_index(),
    )
    total_steps, steps_per_epoch = resolve_steps(config, source.num_examples(config))
    data = processes.of_first(functools.partial(source.identities, config))
    evals = evaluate.present(config.evals)
    for entry in evals.values():  # now, not after the last step
        processes.run_together(functools.partial(evaluate.check, entry))
    check_best_entry(config, evals)
    metrics_writer.check_wandb(config.wandb)

    # 2. Model, optimiser and step, as shapes only.
    program = train_step.build(
        config, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    memory.check(asked, mesh, there, program)

    # 3. State: the newest checkpoint that is whole, else a fresh start from the seed and `config.init`.
    mark = ends.enter_context(lock.held(workdir)) if main_process else None
    ends.enter_context(storage_faults.in_a_line(workdir))
    checkpoints = checkpoint.manager(workdir, config)
    placed = checkpoint.placed(program.state, program.shardings)
    tell = lambda text: print(text, file=sys.stderr, flush=True) if main_process else None  # noqa: E731
    state = checkpoint.restore_newest(checkpoints, config, placed, tell, data)
    if state is None:
        state = initialise.state_of_step_0(config, program, tell)
    start_step = int(state.step)
    log = None
    if main_process:
        atomic.write_text(workdir / "config.json", config_lib.to_json(config))
        tokenizer.keep_copy(config.model.text, workdir)
        peak = flops.peak_flops(jax.devices()[0].device_kind, config.dtype)
        log = metrics_writer.MetricsWriter(
            workdir,
            start_step,
            total_steps,
            config.batch_size,
            flops_per_image=flops.per_image(config).train,
            peak_flops=peak and peak * jax.device_count(),
            config=config,
        )
    receipts = receipt.Receipts(
        workdir,
        mesh,
        config,
        checkpoint.read_json(checkpoints.directory / str(start_step), "receipt")
        if start_step
        else None,
        data,
    )
    if derived_from:
        tell(derived_from)
    text_counts = metrics_writer.TextCounts(
        last_text_counts(state, log.lines() if log else []), config.text.max_dropped_share
    )
    advice = functools.cache(functools.partial(row_advice, config, source))
    say = log.say if log else lambda text: None
    millions = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
    say(
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)},"
        f" {millions:.1f}M parameters, {total_steps} steps of {config.batch_size} images"
        + (f", resumed at step {start_step}" if start_step else "")
    )

    # 4. Compile.
    began = time.monotonic()
    with log.pause() if log else contextlib.nullcontext():
        lowered = program.step.lower(program.state, program.batch)
        best_is_evaluated = config.checkpoint_best_metric.startswith("eval/")
        if not best_is_evaluated:
            check_best_metric(config, lowered.out_info[1])
        step_fn = lowered.compile()
    say(f"compiled in {metrics_writer.duration(time.monotonic() - began)}")
    warning = memory.check_step(asked, mesh, program, step_fn, there)
    if warning:
        say(warning)
    wait_for_all("compiled")

    # 5. The loop. After each step `state.step` = `step` steps are done, and batches 0 .. step-1 used.
    batches = device.prefetch(
        source.batches(
            config,
            lanes=lanes,
            start_step=start_step,
        ),
        program.batch_sharding,
    )
    trace = profiling.StepTrace(
        workdir,
        start=config.profile_start,
        steps=config.profile_steps,
        process_index=jax.process_index(),
    )
    last_good_step, last_save = start_step, time.monotonic()
    results: dict[str, float] = {}
    preempted = False
    with handler.training(), contextlib.ExitStack() as closes:
        closes.callback(watch.stop)  # whatever ends the loop, these run from the last to the first
        if log:
            closes.callback(log.close)
        closes.callback(trace.close)
        closes.callback(checkpoints.close)
        closes.callback(checkpoints.wait_until_finished)  # the save under way is finished
        closes.callback(batches.close)
        with watch.running(start_step), storage_faults.in_a_line(workdir):
            for step in range(start_step + 1, total_steps + 1):
                trace.begin(step)
                batch = next(batches)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                trace.end(step, metrics)
                watch.stepped(step)
                if mark:
                    mark.check()

                last = step == total_steps
                preempted = handler.reached()
                evaluates = evals and (last or at_interval(step, config.eval_every))
                evaluates = evaluates and not preempted  # there may be half a minute left
                saves = last or preempted or at_interval(step, config.checkpoint_every)
                saves = saves or (evaluates and best_is_evaluated)
                logs = last or evaluates or at_interval(step, config.log_every)
                if logs and config.checkpoint_every_minutes and not saves:
                    saves = agreed(
                        time.monotonic() - last_save > 60 * config.checkpoint_every_minutes
                    )
                if logs or saves:  # a state that is not finite is never saved
                    values = {name: float(value) for name, value in metrics.items()}
                    metrics_writer.check_finite(values, last_good_step, step)
                    last_good_step = step
                if logs:
                    values |= text_counts.add(values)
                if log and logs:
                    values |= log.rates(step, batches.wait_seconds, batches.wait_steps)
                    log.progress(step, values)
                if evaluates:
                    with watch.pause(), log.pause() if log else contextlib.nullcontext():
                        results = evaluate_all(config, evals, state, workdir)
                    values |= results
                    if results and best_is_evaluated:
                        check_best_metric(config, results)
                if log and logs:
                    # Before the save: what is restored has its lines.
                    log.write(step, values | digests.chains(state.receipt))
                if logs and (warning := text_counts.check(step, advice)):
                    say(warning)
                if saves:
                    if log:
                        log.flush()
                    checkpoints.wait_until_finished()  # of the last one, before the next has a record
                    record = receipts.add(state, log.lines() if log else ())
                    best = best_metric(config, values)
                    checkpoint.save(checkpoints, state, config, record, best, data)
                    last_save = time.monotonic()
                if preempted:
                    break
    if preempted:
        say(
            f"told to end: saved at step {step} of {total_steps}; the same command goes on from there"
        )
        sys.exit(handler.status)

    # 6. What came of it.
    if not results and evals:  # the run was complete already
        results = evaluate_all(config, evals, state, workdir)
    predictor = make_predictor(config, state)
    if log:
        report(dataclasses.replace(config, evals=evals), workdir, predictor, results)


def at_interval(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 is never."""
    return bool(every) and step % every == 0


def wait_for_all(key: str) -> None:
    """Waits until all processes are here, however long; a collective gives up after half a minute on CPUs.

    One that dies on the way does not keep the others: the heartbeat ends them.
    """
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=7 * 24 * 3600 * 1000)


def agreed(due: bool) -> bool:
    """The first process's opinion, on all of them: clocks differ."""
    if jax.process_count() == 1:
        return due
    return bool(multihost_utils.broadcast_one_to_all(jnp.asarray(due)))


def last_text_counts(state: train_step.TrainState, lines: Sequence[str]) -> dict[str, float]:
    """`metrics_writer.TextCounts.NAMES` at the first process's last line, or in `state` where that has none of them."""

    def last():
        line = json.loads(lines[-1]) if lines else {}
        found = {name: line.get(name) for name in metrics_writer.TextCounts.NAMES}
        if all(isinstance(n, (int, float)) and math.isfinite(n) for n in found.values()):
            return found
        counts = (state.text_counts[0], state.texts_dropped, state.text_counts[1])
        return dict(zip(metrics_writer.TextCounts.NAMES, map(int, counts)))

    return processes.of_first(last)


def row_advice(config: config_lib.Config, source: sources.DataSource) -> str:
    """What to set where too many texts do not fit: rows by the lengths of the data set's texts."""
    rows = derived.rows_of(config, config.text.pack_group, source.text_lengths(config)).rows
    return (
        f"set --config.text.pack_rows={max(rows, config.text.pack_rows + 1)} (got"
        f" {config.text.pack_rows}, for groups of {config.text.pack_group})"
    )


def check_best_metric(config: config_lib.Config, known: Collection[str]) -> None:
    """Raises UserError where `checkpoint_best_metric` is set and none of the `known` names."""
    name = config.checkpoint_best_metric
    if name and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise errors.UserError(
            f"checkpoint_best_metric: got {name!r}, which is not measured; did you mean {near[0]!r}?"
        )


def check_best_entry(config: config_lib.Config, evals: Collection[str]) -> None:
    """Raises UserError where `checkpoint_best_metric` is one of an entry that is skipped."""
    group, _, rest = config.checkpoint_best_metric.partition("/")
    name = rest.partition("/")[0]
    if group == "eval" and name not in evals:
        raise errors.UserError(
            f"checkpoint_best_metric: got {config.checkpoint_best_metric!r}, but evals.{name} is skipped,"
            " because its data is missing"
        )


def best_metric(config: config_lib.Config, values: Mapping[str, float]) -> dict[str, float] | None:
    """What the best checkpoint is chosen by, where this step has it: the first process's, on all of them."""
    name = config.checkpoint_best_metric
    if not name:
        return None
    value = values.get(name, math.nan)
    if jax.process_count() > 1:  # rates are known to the first one only
        value = float(multihost_utils.broadcast_one_to_all(jnp.asarray(value)))
    return None if math.isnan(value) else {name: value}


def make_predictor(config: config_lib.Config, state: train_step.TrainState) -> inference.Predictor:
    """The state's model (the average where one is kept) for evaluation, whole on every process."""
    params = state.ema_params or state.params
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return inference.Predictor(config.model, params)


def evaluate_all(
    config: config_lib.Config,
    evals: Mapping[str, config_lib.Evaluator],
    state: train_step.TrainState,
    workdir: epath.Path,
) -> dict[str, float]:
    """The numbers of the evaluators `evals`; the processes share the images, and all get the numbers."""
    results, step = {}, int(state.step)
    with errors.out_of_memory_in_a_line("evaluation", lambda: evaluate.SMALLER):
        predictor = make_predictor(config, state)
        for name, entry in evals.items():
            options = {}
            if entry.kind == "diagnostics":  # compares with the evaluation before
                options = dict(state_path=workdir / "diagnostics" / f"{name}.json", step=step)
            numbers = evaluate.run(entry, predictor, **options)
            results |= {f"eval/{name}/{key}": value for key, value in numbers.items()}
    return results


def report(config, workdir, predictor, results) -> None:
    """Prints the final table, draws the curves and the test images, and writes report.html."""
    pictures.curves(workdir / "metrics.jsonl", workdir / "curves.png")
    if results:
        atomic.write_text(workdir / "results.json", json.dumps(results, indent=2) + "\n")
        pictures.print_table(results)
    entry = next((e for e in config.evals.values() if e.kind == "grounding"), None)
    if config.pictures and entry:
        pictures.regions_grid(
            predictor,
            entry.annotations,
            entry.images,
            workdir / "regions.png",
            count=config.pictures,
        )
    page.write(workdir, predictor, model=bool(config.pictures))
    print(f"Everything of this run is in {workdir}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Parses the command line and trains."""
    command_line.show_help(argv, __doc__)
    argv = [re.sub("^--print-shardings", "--print_shardings", a) for a in argv]
    config = command_line.parse_config(argv, CONFIG)
    if PRINT_SHARDINGS.value:
        mesh = sharding.make_mesh(config.mesh)
        config, _ = derived.planned(config, derived.Place(sharding.batch_shards(mesh)))
        program = train_step.build(config, mesh, total_steps=1, steps_per_epoch=1.0)
        print(f"mesh {dict(mesh.shape)}")
        print(sharding.table(program.state, program.shardings))
        return
    if not WORKDIR.value:
        command_line.fail("--workdir: missing; the folder that the run writes to")
    keep_freed_memory()
    handler, watch = preemption.PreemptionHandler(), watchdog.Watchdog(STALL_SECONDS.value)
    handler.listen()
    storage_faults.quiet_threads()
    found = distributed.initialize(
        COORDINATOR.value, PROCESSES.value, PROCESS_ID.value, HEARTBEAT_SECONDS.value
    )
    if jax.distributed.is_initialized():
        print(found, file=sys.stderr, flush=True)
    workdir = epath.Path(WORKDIR.value)
    with distributed.ending_together(HEARTBEAT_SECONDS.value):
        with errors.out_of_memory_in_a_line("training", lambda: memory.training_advice(config)):
            train(config, workdir, handler, watch)


if __name__ == "__main__":
    ending.run(functools.partial(command_line.main, main))
