"""A profiler trace of steps of the training loop, where TensorBoard's profile plugin and XProf look for it.

JAX's profiler writes to local folders alone, and names a trace after the time of its end. `StepTrace` moves
the file of each process to `tensorboard/plugins/profile/step_N` of the workdir, also in an object store.
"""

import tempfile
import threading
from typing import Any

import jax
from etils import epath


class StepTrace:
    """Traces `steps` steps from `start` on, and the next after `ask`; each step calls `begin` and `end`.

    Args:
      workdir: the run's folder, or its URL in an object store.
      start: first step that is traced; 0 = none. A run that is resumed later traces those that are left.
      steps: how many.
    """

    def __init__(self, workdir: epath.PathLike, start: int, steps: int):
        self._folder = epath.Path(workdir) / "tensorboard" / "plugins" / "profile"
        self._count = steps
        self._steps = range(start, start + steps) if start else range(0)
        self._asked = threading.Event()
        self._first = 0  # step of the trace that runs
        self._local: tempfile.TemporaryDirectory | None = None
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def ask(self) -> None:
        """Traces the next steps, unless a trace is under way; any thread may call it."""
        self._asked.set()

    def begin(self, step: int) -> None:
        """Before the step's batch is fetched: starts the trace where it is due, and marks the step in it."""
        if self._asked.is_set():
            self._asked.clear()
            if self._local is None:
                self._steps = range(step, step + self._count)
        if step not in self._steps:
            return
        if self._local is None:
            self._first = step
            self._local = tempfile.TemporaryDirectory(prefix="grain_jax_trace_")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call: slow, and ten times the file
            jax.profiler.start_trace(self._local.name, profiler_options=options)
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def end(self, step: int, outputs: Any) -> None:
        """After the step was started: after the last one waits for `outputs` (arrays), writes the trace."""
        if step not in self._steps or self._annotation is None:
            return
        if step == self._steps[-1]:
            jax.block_until_ready(outputs)
        self._annotation.__exit__(None, None, None)
        if step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes the trace under way, if any: the run may end before the last step that was asked for."""
        if self._local is None:
            return
        jax.profiler.stop_trace()
        folder = self._folder / f"step_{self._first}"
        folder.mkdir(parents=True, exist_ok=True)
        for kind in (".xplane.pb", ".trace.json.gz"):
            for file in epath.Path(self._local.name).glob(f"plugins/profile/*/*{kind}"):
                name = f"process_{jax.process_index():05d}{kind}"
                (folder / name).write_bytes(file.read_bytes())
        self._local.cleanup()
        self._local = None
