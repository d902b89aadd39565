"""Writes a run's numbers: `metrics.jsonl`, TensorBoard and Weights & Biases."""

import dataclasses
import functools
import importlib.util
import json
import secrets
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import atomic, errors, metrics_file
from grain_jax.runtime import ending

UPLOAD_EVERY = 30.0  # seconds between uploads to an object store; a checkpoint does not wait for it


def is_object_store(path: epath.PathLike) -> bool:
    """Whether `path` is a URL such as gs://bucket/run, where files are written whole or not at all."""
    return "://" in str(path)


def check_wandb(options: config_lib.Wandb) -> None:
    """Raises UserError where Weights & Biases is asked for and its package is not there."""
    if options.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise errors.UserError(
            f"wandb.mode={options.mode} needs the package wandb: pip install 'grain_jax[wandb]', or take"
            " --config.wandb.mode=off"
        )


def _open_wandb(workdir: epath.Path, config: config_lib.Config):
    """The run at Weights & Biases; the same one after a restart, by the id that the workdir holds."""
    import wandb  # optional, and a second to import

    options: Any = config.wandb  # whose strings are literals to wandb's types
    id_path = workdir / "wandb_id.txt"
    if not id_path.exists():
        atomic.write_text(id_path, secrets.token_hex(4) + "\n")
    try:
        return wandb.init(
            project=config.wandb.project,
            name=config.wandb.name or workdir.name,
            id=id_path.read_text().strip(),
            resume="allow",  # offline it is noted in the file, so that a sync adds to the run
            mode=options.mode,
            dir=None if is_object_store(workdir) else str(workdir),
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True, console="off"),  # the progress line is ours
        )
    except wandb.Error as error:
        raise errors.UserError(
            f"wandb.mode={config.wandb.mode}: {' '.join(str(error).split())} Or take"
            " --config.wandb.mode=offline, or off"
        ) from None


class _Events:
    """TensorBoard's scalars by tensorboardX, without the queue of its SummaryWriter: a kill loses nothing.

    TensorBoard forgets what earlier files have from `purge_step` on. A flush uploads the whole file.
    """

    def __init__(self, folder: epath.Path, purge_step: int, is_remote: bool):
        self._folder, self._purge_step, self._is_remote = folder, purge_step, is_remote
        self._writer: Any = None  # until the first event

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter  # half a second to import
        from tensorboardX.proto import event_pb2, summary_pb2

        # protobuf makes these classes when the modules are imported
        self._Event, self._Summary = vars(event_pb2)["Event"], vars(summary_pb2)["Summary"]
        self._local = self._folder
        if self._is_remote:
            self._local = epath.Path(tempfile.mkdtemp(prefix="grain_jax_"))
            ending.at_end(functools.partial(self._local.rmtree, missing_ok=True))
        self._local.mkdir(parents=True, exist_ok=True)
        # The suffix tells files of one second apart, and keeps them in order.
        writer = EventsWriter(str(self._local / "events"), f".{self._purge_step:09d}")
        start = vars(event_pb2)["SessionLog"](status=1)  # START
        writer.write_event(self._Event(step=self._purge_step, session_log=start))
        return writer

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event with all scalars."""
        if self._writer is None:
            self._writer = self._open()
        values = [self._Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = self._Summary(value=values)
        self._writer.write_event(self._Event(step=step, wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        for file in self._local.glob("events*") if self._is_remote else ():
            (self._folder / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MetricsWriter:
    """Writes a run's metrics; only the first process of a run should have one.

    An object store cannot append: there the files are uploaded whole, at checkpoints and at times between.

    Args:
      workdir: the run's folder, or its URL in an object store.
      start_step: metrics beyond it, of a run that was cut off, are removed.
      config: of the run; its `wandb` says whether Weights & Biases gets the metrics too. None: it does not.

    Raises:
      UserError: Weights & Biases is asked for and cannot be reached.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, config: config_lib.Config | None = None):
        workdir = epath.Path(workdir)
        self._path, self._is_remote = workdir / metrics_file.FILE, is_object_store(workdir)
        before = {x.step: x.text for x in reversed(metrics_file.read(workdir)) if x.step <= start_step}
        self._lines = [before[step] for step in sorted(before)]
        self._upload_due, self._wandb = time.monotonic() + UPLOAD_EVERY, None
        self._write_whole()
        self._events = _Events(workdir / "tensorboard", start_step + 1, self._is_remote)
        if config is not None and config.wandb.mode != "off":
            self._wandb = _open_wandb(workdir, config)

    def _write_whole(self) -> None:
        atomic.write_text(self._path, "".join(f"{line}\n" for line in self._lines))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line to `metrics.jsonl` and its numbers to TensorBoard and Weights & Biases."""
        self._lines.append(json.dumps({"step": step, **metrics}))
        if not self._is_remote:
            with self._path.open("a") as file:
                file.write(self._lines[-1] + "\n")
        self._events.write(step, metrics)
        if not self._is_remote:
            self._events.flush()
        elif time.monotonic() > self._upload_due:
            self.flush()
        # After a restart some steps come again, with the same values: the service keeps the first.
        if self._wandb and step >= self._wandb.step:
            self._wandb.log(dict(metrics), step=step)

    def last(self) -> dict[str, Any]:
        """The values of the last line; {} without one."""
        return json.loads(self._lines[-1]) if self._lines else {}

    def flush(self) -> None:
        """Brings the disk or an object store up to date; before a checkpoint, so that it has its lines."""
        self._events.flush()
        if self._is_remote:
            self._write_whole()
        else:
            atomic.sync([self._path])
        self._upload_due = time.monotonic() + UPLOAD_EVERY

    def close(self) -> None:
        """Ends TensorBoard's file and the run at Weights & Biases; an object store gets the rest."""
        self.flush()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
