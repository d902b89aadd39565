"""The trainer: grain-jax train --config FILE|NAME --workdir DIR [--config.a.b=value ...]

`_train` is a run from top to bottom. The same command resumes from the last checkpoint. The data's order is a
function of the step (docs/method.md, Order of the data), so a checkpoint needs no position in the data.
After SIGTERM or Ctrl-C the run saves and ends with status 75 or 130 (ending.py), after a second one without
saving. One trainer at a time has a workdir (lock.py). A run without a step for long ends itself (ending.py).
"""

import contextlib
import ctypes
import functools
import importlib.util
import sys
import time
from collections.abc import Sequence

import jax
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import files, states
from grain_jax.cli import process
from grain_jax.config import loading
from grain_jax.core import errors, progress
from grain_jax.input_pipeline import derived, device, record_folders
from grain_jax.models import attention, placement
from grain_jax.runtime import distributed, ending, lock, processes
from grain_jax.train import (
    goodput,
    initialise,
    journal,
    layer_trials,
    memory_check,
    profiling,
    schedule,
    set_up,
    sharding,
    train_step,
)
from grain_jax.train.arguments import Train

_RESUMES = "the same command goes on from the newest checkpoint"


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it to the kernel.

    XLA's CPU backend allocates its temporaries anew at every step: half of the demo's step on two cores.
    Other systems and allocators have no such switch and need none.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)


def train(
    config: config_lib.Config,
    workdir: epath.Path,
    handler: ending.PreemptionHandler | None = None,
    watch: ending.Watchdog | None = None,
) -> None:
    """One run, from the newest checkpoint of its workdir to its last step, or where `handler` ends it.

    `watch` ends the process where no step is done for long.

    Raises:
      UserError: the input, the workdir or the disk does not allow the run.
      faults.NotFinite: a loss or the gradient is NaN or infinite; such a state is never saved.
      faults.TextsLost: too many texts do not fit into their rows.
      SystemExit: the run was told to end, and is saved.
    """
    handler, watch = handler or ending.PreemptionHandler(), watch or ending.Watchdog()
    first = jax.process_index() == 0
    with lock.held(workdir) if first else contextlib.nullcontext():
        with errors.storage_faults_as_one_line(workdir, _RESUMES):
            _train(config, workdir, handler, watch)


def _train(
    config: config_lib.Config, workdir: epath.Path, handler: ending.PreemptionHandler, watch: ending.Watchdog
) -> None:
    """`train`, in a workdir that is locked."""
    # 1. Devices, data and programs.
    clock = goodput.Clock()
    if config.profile_port:  # for "capture profile" in TensorBoard
        jax.profiler.start_server(config.profile_port)
    run = set_up.set_up(config, workdir)
    with clock.spend("compile"):
        run = layer_trials.choose(run, workdir)
    config = run.config

    # 2. Model, optimiser and step, as shapes only.
    program = train_step.build(
        config, run.mesh, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch
    )
    memory_check.check(program)

    # 3. State: the newest checkpoint that is whole, else a fresh start from the seed and `config.init`.
    checkpoints = states.Checkpoints(workdir, config)
    with clock.spend("restore" if files.finished_steps(workdir) else "other"):
        state = checkpoints.restore_newest(
            states.placed(program.state, program.shardings), set_up.tell, run.data
        )
        if state is None:
            state = initialise.state_of_step_0(run.config, program, set_up.tell)
    start_step = int(state.step)
    log = journal.Journal(run, workdir, state, clock)
    log.say_what_runs(state)

    # 4. Compile.
    with clock.spend("compile"):
        step_fn = compile_step(run, program, log)

    # 5. The loop. After each step `state.step` = `step` steps are done, and batches 0 .. step-1 used.
    on_host = run.source.batches(config, lanes=run.lanes, start_step=start_step)
    batches = device.Prefetch(on_host, program.batch_sharding)
    trace = profiling.StepTrace(workdir, config.profile_start, config.profile_steps)
    handler.on_usr2(trace.ask)
    plan = schedule.Schedule(config, run.total_steps, has_evals=bool(run.evals))
    step, preempted, results = start_step, False, {}
    with handler.training(), contextlib.ExitStack() as closes:
        closes.callback(watch.stop)  # whatever ends the loop, these run from the last to the first
        closes.callback(log.close)
        closes.callback(trace.close)
        closes.callback(checkpoints.close)
        # The save under way is finished.
        waits = "waiting for a checkpoint to be written"
        closes.callback(clock.spend("save")(watch.doing(waits)(checkpoints.wait)))
        closes.callback(watch.doing("waiting for the input to stop")(batches.close))
        with watch.running(start_step), clock.spend("steps"):
            for step in range(start_step + 1, run.total_steps + 1):
                trace.begin(step)
                with watch.doing("waiting for the next batch (input)"), clock.spend("input"):
                    batch = next(batches)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                trace.end(step, metrics)
                watch.stepped(step)
                preempted = handler.reached(step)
                due = plan.due(step, preempted=preempted)
                values = log.read(step, metrics) if due.log or due.save else {}
                if due.log:
                    values |= log.rates(step, values, batches, watch.late)
                with log.apart():
                    if due.evaluate:
                        with watch.pause(), log.pause(), clock.spend("evaluate"):
                            results = journal.evaluate_all(config, run.evals, state)
                        if results and schedule.best_is_evaluated(config):
                            schedule.check_best_metric(config, results)
                        values |= results
                    if due.log:  # before the save: what is restored has its lines
                        with watch.doing("writing metrics.jsonl"):
                            log.write(step, values)
                    if due.save:
                        with watch.doing("saving a checkpoint"), clock.spend("save"):
                            log.flush()
                            checkpoints.save(state, schedule.best_metric(config, values), run.data)
                            plan.saved()
                if preempted:
                    break
    if preempted:
        log.say(
            f"told to end: saved at step {step} of {run.total_steps}; the same command goes on from there"
        )
        log.say(f"time: {clock.words()}")
        sys.exit(handler.status)

    # 6. Final evaluation and report.
    if not results:  # the run was complete already
        with clock.spend("evaluate"):
            results = journal.evaluate_all(config, run.evals, state)
    log.report(state, results)


def compile_step(run: set_up.SetUp, program: train_step.Program, log: journal.Journal):
    """The compiled step; it fits into memory, and measures what the best checkpoint is chosen by."""
    began = time.monotonic()
    with log.pause():
        lowered = program.step.lower(program.state, program.batch)
        if not schedule.best_is_evaluated(run.config):
            schedule.check_best_metric(run.config, lowered.out_info[1])
        usually = "usually under a minute for a small model, 2 to 5 minutes for a large one"
        with progress.while_compiling("the training step", usually, silent=jax.process_index() > 0):
            step_fn = lowered.compile()
    with placement.on(run.mesh, sharding.BATCH_AXES):
        programs = attention.of_towers(run.config.model, run.config.dtype)
    took = progress.duration(time.monotonic() - began)
    log.say(f"compiled in {took}; attention of the towers: {programs}")
    memory_check.check_step(step_fn)
    processes.wait_for_all("compiled")
    return step_fn


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    args = Train.parse(arguments)
    config = loading.load(args.config, args.overrides)
    if args.print_shardings:
        config, mesh = config.with_dtype(jax.default_backend()), sharding.make_mesh(config.mesh)
        config, _ = derived.planned(config, derived.Limits(sharding.batch_shards(mesh)))
        program = train_step.build(config, mesh, total_steps=1, steps_per_epoch=1.0)
        print(f"mesh {dict(mesh.shape)}")
        print(sharding.table(program.state, program.shardings))
        return
    has_tensorflow = importlib.util.find_spec("tensorflow")  # else the extra is missing: said below
    if has_tensorflow and config.input.source == "records" and not config.input.prepare:
        for source in config.input.sets:  # before TensorFlow is imported and the workdir made
            record_folders.existing_folder_of(source)
    keep_freed_memory()
    distributed.keep_compiled_programs()
    handler, watch = ending.PreemptionHandler(), ending.Watchdog(args.stall_seconds)
    handler.listen()
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
