"""What a run tells: `metrics.jsonl`, TensorBoard, a progress line with ETA, and the stop on NaN."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from shutil import get_terminal_size

from etils import epath

PLAIN_LINE_EVERY = 5.0  # seconds, where there is no terminal to rewrite a line on

LOSS_TERMS = ("loss_image_caption", "loss_box", "loss_region_description", "loss")
CHECKED = (*LOSS_TERMS, "grad_norm")  # a finite loss may have a gradient that is not


class NotFinite(ArithmeticError):
    """A loss became NaN or infinite; the message names the term and the steps."""


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h10m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def check_finite(metrics: Mapping[str, float], last_good_step: int, step: int) -> None:
    """Raises NotFinite, naming the first bad term and the steps in which it turned bad."""
    for term in CHECKED:
        if not math.isfinite(metrics[term]):
            raise NotFinite(
                f"{term} is {metrics[term]} at step {step}; it was finite at step {last_good_step}."
                " The checkpoints before it are kept. Lower optim.learning_rate, set optim.clip_norm, or"
                " look at the data of these steps; where a restart fails again, remove the newest checkpoint."
            )


class Monitor:
    """Writes a run's metrics; only the first process of a run should have one.

    Args:
      workdir: the run's folder.
      start_step: metrics beyond it, of a run that was cut off, are removed.
      total_steps: for the ETA.
      batch_size: for images/s.
      flops_per_image: FLOPs that training needs an image (`flops.PerImage.train`).
      peak_flops: FLOPs a second that all devices can do together; None where it is not known.
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
    ):
        self.workdir = epath.Path(workdir)
        self.total_steps, self.batch_size = total_steps, batch_size
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._path = self.workdir / "metrics.jsonl"
        self._keep_until(start_step)
        self._writer = None
        self._start_step = self._step = start_step
        self._time = self._started = time.monotonic()
        self._wait = 0.0
        self._printed = -math.inf

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                pass  # the line that the process was killed in
        self._path.write_text("".join(kept))

    def rates(self, step: int, wait_seconds: float) -> dict[str, float]:
        """What was done a second, and the share of time spent waiting for input, since the last call.

        Args:
          step: steps done.
          wait_seconds: seconds waited for input since the start.

        Returns:
          `images_per_second`, `model_flops_per_second` (on all devices together), `input_wait_fraction` and,
          where the peak is known, `mfu`: the share of it that the model's FLOPs are.
        """
        now = time.monotonic()
        elapsed = max(now - self._time, 1e-9)
        images_per_second = (step - self._step) * self.batch_size / elapsed
        out = {
            "images_per_second": images_per_second,
            "model_flops_per_second": images_per_second * self.flops_per_image,
            "input_wait_fraction": (wait_seconds - self._wait) / elapsed,
        }
        if self.peak_flops:
            out["mfu"] = out["model_flops_per_second"] / self.peak_flops
        self._time, self._step, self._wait = now, step, wait_seconds
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
        """Adds a line to `metrics.jsonl` and the scalars to TensorBoard."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer is None:
            from tensorboardX import SummaryWriter  # half a second to import

            self._writer = SummaryWriter(
                str(self.workdir / "tensorboard"), purge_step=self._start_step + 1
            )
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rewrites the progress line of a terminal, or prints one now and then elsewhere."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        last = step >= self.total_steps
        if not terminal and not last and now - self._printed < PLAIN_LINE_EVERY:
            return
        self._printed = now
        done = step - self._start_step
        eta = (now - self._started) / max(done, 1) * (self.total_steps - step)
        line = (
            f"step {step}/{self.total_steps} ({step / self.total_steps:.0%})"
            f"  ETA {duration(eta)}"
            f"  loss {metrics['loss']:.3f}"
            f" = caption {metrics['loss_image_caption']:.3f}"
            f", box {metrics['loss_box']:.3f}"
            f", region {metrics['loss_region_description']:.3f}"
            f"  IoU {metrics['matched_iou']:.2f}"
            f"  {metrics['images_per_second']:.0f} images/s"
            + (f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else "")
            + f"  input wait {metrics['input_wait_fraction']:.1%}"
        )
        end = "\n" if last or not terminal else ""
        if terminal:  # a line that wraps could not be rewritten
            line = line[: get_terminal_size().columns - 1]
        print(("\r\x1b[2K" if terminal else "") + line, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        print(("\r\x1b[2K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
