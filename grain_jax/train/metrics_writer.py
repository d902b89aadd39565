"""What a run tells: `metrics.jsonl`, TensorBoard, Weights & Biases, a progress line, and the stop on NaN.

An object store cannot append to a file. If the workdir is in one, files are written whole, at checkpoints and
every half minute.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import atomic, errors, metrics_file, progress
from grain_jax.runtime import ending

UPLOAD_EVERY = 30.0  # seconds between uploads to an object store; a checkpoint does not wait for it


class NotFinite(errors.UserError, ArithmeticError):
    """A loss became NaN or infinite; the message names the term and the steps."""

    status = 1  # the command was right


def check_finite(metrics: Mapping[str, float], last_good_step: int, step: int, terms: Iterable[str]) -> None:
    """Raises NotFinite with the first bad one of the `metrics` of a `step`: the loss `terms`, total and gradient."""
    for term in (*terms, "loss", "grad_norm"):  # a finite loss may have a gradient that is not
        if not math.isfinite(metrics.get(term, 0)):  # a term that is off has none
            raise NotFinite(
                f"{term} is {metrics[term]} at step {step}; it was finite at step {last_good_step}."
                " The checkpoints before it are kept. Lower optim.learning_rate, set optim.clip_norm, or"
                " look at the data of these steps; where a restart fails again, remove the newest checkpoint."
            )


class TextsLost(errors.UserError):
    """Too many texts do not fit into their rows; the message says what to set."""


class TextCounts:
    """How many texts came, and what became of them: whole numbers, the same on every mesh and after a restart.

    The step counts modulo 2**32, this class without.

    Args:
      last: the counts of NAMES at the last line; without a line, at the start.
      max_share: of the texts, above which `check` ends the run.
    """

    NAMES = ("texts", "texts_dropped", "texts_too_long")
    WARN = 0.01  # share of the texts

    def __init__(self, last: Mapping[str, float], max_share: float):
        self._last: dict[str, int] = {name: int(last[name]) for name in self.NAMES}
        self._new: dict[str, int] = dict.fromkeys(self.NAMES, 0)
        self._max_share = max_share

    def add(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What a line says of the texts, from the `metrics` of its step.

        Returns:
          The counts of NAMES since step 0, and shares of the texts since the last line: `texts_dropped_share` were
          dropped or cut to fit into rows, `texts_too_long_share` were cut by the tokenizer.
        """
        self._new = {n: (int(metrics[n]) - self._last[n]) % 2**32 for n in self.NAMES}
        self._last = {n: self._last[n] + self._new[n] for n in self.NAMES}
        shares = {f"{n}_share": self._share(n) for n in self.NAMES[1:]}
        return {name: float(value) for name, value in self._last.items()} | shares

    def _share(self, name: str) -> float:
        return self._new[name] / max(self._new["texts"], 1)

    def _above(self, share: float) -> bool:
        """Whether more than that share was dropped, by more than two standard deviations: lines may be short."""
        dropped = self._new["texts_dropped"]
        return dropped - 2 * math.sqrt(dropped) > share * self._new["texts"]

    def check(self, step: int, advice: Callable[[], str]) -> str | None:
        """A warning about the texts of the last line, which is of `step`, or None; `advice` says what to set.

        Raises:
          TextsLost: the share is above `max_share`.
        """
        if not self._above(self.WARN):
            return None
        found = (
            f"step {step}: {self._share('texts_dropped'):.1%} of the texts since the line before were"
            " dropped or cut, because they do not fit into their rows"
        )
        if self._max_share < 1 and self._above(self._max_share):
            raise TextsLost(
                f"{found}; text.max_dropped_share = {self._max_share:g} ends the run: {advice()}, or"
                " --config.text.max_dropped_share=1 to go on"
            )
        return f"{found}: {advice()}"


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


class _TensorBoard:
    """TensorBoard's scalars, by tf.summary; none without TensorFlow.

    Args:
      folder: its event files are replaced by one. In an object store `upload` writes it.
      lines: of the steps before this run, which the new file gets first.
    """

    def __init__(self, folder: epath.Path, lines: Iterable[metrics_file.Line]):
        self._writer: Any = None
        self._folder = folder
        if importlib.util.find_spec("tensorflow") is None:
            return
        import tensorflow as tf  # two seconds to import

        before = list(folder.glob("events.*"))
        self._local = folder
        if is_object_store(folder):
            self._local = epath.Path(tempfile.mkdtemp(prefix="grain_jax_"))
            ending.at_end(functools.partial(self._local.rmtree, missing_ok=True))
        self._tf, self._writer = tf, tf.summary.create_file_writer(str(self._local))
        for line in lines:
            self._add(line.step, dict(metrics_file.numbers(line)))
        self._writer.flush()
        self.upload()
        for file in before:
            file.unlink()

    def upload(self) -> None:
        """Writes the file to an object store, if the folder is in one."""
        if self._writer is not None and self._local != self._folder:
            for file in self._local.glob("events.*"):
                (self._folder / file.name).write_bytes(file.read_bytes())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """All scalars of a step, which are in the file at once."""
        if self._writer is not None:
            self._add(step, metrics)
            self._writer.flush()

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        Summary = (
            self._tf.compat.v1.Summary
        )  # one event for all scalars: tf.summary.scalar writes one for each
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        with self._writer.as_default():
            self._tf.summary.experimental.write_raw_pb(Summary(value=values).SerializeToString(), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MetricsWriter:
    """Writes a run's metrics; only the first process of a run should have one.

    Args:
      workdir: the run's folder, or its URL in an object store.
      start_step: metrics beyond it, of a run that was cut off, are removed.
      total_steps: for the ETA.
      batch_size: for images/s.
      flops_per_image: FLOPs that training needs an image (`flops.FlopsPerImage.train`).
      peak_flops: FLOPs a second that all devices can do together; None where it is not known.
      config: of the run; its `wandb` says whether Weights & Biases gets the metrics too. None: it does not.
      terms: metric of each loss term -> its name in the progress line, and its weight.

    Raises:
      UserError: Weights & Biases is asked for and cannot be reached.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        start_step: int,
        total_steps: int,
        batch_size: int,
        *,
        flops_per_image: float = 0.0,
        peak_flops: float | None = None,
        config: config_lib.Config | None = None,
        terms: Mapping[str, tuple[str, float]] | None = None,
    ):
        self.workdir, self._line = epath.Path(workdir), progress.ProgressLine()
        self._terms = terms or {}
        self.total_steps, self.batch_size = total_steps, batch_size
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._path = self.workdir / metrics_file.FILE
        self._remote = is_object_store(workdir)
        before = {x.step: x for x in reversed(metrics_file.read(workdir)) if x.step <= start_step}
        kept = [before[step] for step in sorted(before)]
        self._lines = [line.text for line in kept]
        self._write_whole()
        self._tensorboard = _TensorBoard(self.workdir / "tensorboard", kept)
        self._wandb = None
        if config is not None and config.wandb.mode != "off":
            self._wandb = _open_wandb(self.workdir, config)
        self._start_step = self._step = start_step
        self._time = self._started = time.monotonic()
        self._upload_due = self._started + UPLOAD_EVERY
        self._wait, self._shown = 0.0, False

    def _write_whole(self) -> None:
        atomic.write_text(self._path, "".join(f"{line}\n" for line in self._lines))

    def rates(self, step: int, wait_seconds: float) -> dict[str, float]:
        """What was done a second, and the share of the time that input held up, since the last call.

        Args:
          step: steps done.
          wait_seconds: seconds waited for input since the start.

        Returns:
          `images_per_second`, `model_flops_per_second` (on all devices together), `input_wait_fraction`;
          and `mfu`, the share of the peak that the model's FLOPs are, where it is known.
        """
        now = time.monotonic()
        elapsed = max(now - self._time, 1e-9)
        steps = step - self._step
        images_per_second = steps * self.batch_size / elapsed
        out = {
            "images_per_second": images_per_second,
            "model_flops_per_second": images_per_second * self.flops_per_image,
            "input_wait_fraction": (wait_seconds - self._wait) / elapsed,
        }
        if self.peak_flops:
            out["mfu"] = out["model_flops_per_second"] / self.peak_flops
        self._time, self._step = now, step
        self._wait = wait_seconds
        return out

    @contextlib.contextmanager
    def pause(self):
        """Leaves what happens inside (compiling, evaluating) out of rates and ETA."""
        began = time.monotonic()
        try:
            yield
        finally:
            away = time.monotonic() - began
            self._time += away
            self._started += away

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line to `metrics.jsonl` and its numbers to TensorBoard and Weights & Biases."""
        self._lines.append(json.dumps({"step": step, **metrics}))
        if not self._remote:
            with self._path.open("a") as file:
                file.write(self._lines[-1] + "\n")
        self._tensorboard.write(step, metrics)
        # After a restart some steps come again, with the same values: the service keeps the first.
        if self._wandb and step >= self._wandb.step:
            self._wandb.log(dict(metrics), step=step)
        if self._remote and time.monotonic() > self._upload_due:
            self.flush()

    def lines(self) -> list[str]:
        """The lines of `metrics.jsonl` so far."""
        return self._lines

    def flush(self) -> None:
        """Brings the disk or an object store up to date; before a checkpoint, so that it has its lines."""
        if self._remote:
            self._write_whole()
            self._tensorboard.upload()
            self._upload_due = time.monotonic() + UPLOAD_EVERY
        else:
            atomic.sync([self._path])

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rewrites the progress line of a terminal, or prints one now and then elsewhere."""
        last = step >= self.total_steps
        done = step - self._start_step
        eta = (time.monotonic() - self._started) / max(done, 1) * (self.total_steps - step)
        summed, unweighted = [], []
        for term, (name, weight) in self._terms.items():
            value = f"{metrics[term]:.3f}"
            shown = f"{name} {value}" if weight in (0, 1) else f"{name} {weight:g} x {value}"
            (summed if weight else unweighted).append(shown)
        parts = [
            f"step {step}/{self.total_steps} ({step / self.total_steps:.0%})",
            f"ETA {progress.duration(eta)}",
            " = ".join(filter(None, [f"loss {metrics['loss']:.3f}", " + ".join(summed)])),
            *([f"(weight 0: {', '.join(unweighted)})"] if unweighted else []),
            *([f"IoU {metrics['matched_iou']:.2f}"] if "matched_iou" in metrics else []),
            f"{metrics['images_per_second']:.0f} images/s",
            *([f"MFU {metrics['mfu']:.1%}"] if "mfu" in metrics else []),
            f"input wait {metrics['input_wait_fraction']:.1%}",
            f"texts dropped {metrics['texts_dropped_share']:.1%}",
        ]
        self._line.show("  ".join(parts), now=last or not self._shown)
        self._shown = True
        if last:
            self._line.close(stays=True)

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        self._line.say(text)

    def close(self) -> None:
        """Ends TensorBoard's file and the run at Weights & Biases; an object store gets the rest."""
        self._tensorboard.close()
        if self._remote:
            self._write_whole()
            self._tensorboard.upload()
        if self._wandb is not None:
            self._wandb.finish()
