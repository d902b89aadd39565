"""How fast a run is, and its progress line."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from grain_jax.core import progress


class Rates:
    """Measures a run's rates between lines of its log, and shows them.

    Args:
      start_step: that the run resumes from.
      total_steps: for the ETA.
      batch_size: for images/s.
      flops_per_image: FLOPs that training needs an image (`flops.FlopsPerImage.train`).
      peak_flops: FLOPs a second that all devices can do together; None where it is not known.
      terms: metric of each loss term -> its name in the progress line, and its weight.
    """

    def __init__(
        self,
        start_step: int,
        total_steps: int,
        batch_size: int,
        *,
        flops_per_image: float = 0.0,
        peak_flops: float | None = None,
        terms: Mapping[str, tuple[str, float]] | None = None,
    ):
        self._line, self._terms = progress.ProgressLine(), terms or {}
        self._total_steps, self._batch_size = total_steps, batch_size
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._start_step = self._step = start_step
        self._time = self._started = time.monotonic()
        self._wait, self._shown = 0.0, False
        self.say = self._line.say  # prints a line above the progress line

    def since_last(self, step: int, wait_seconds: float) -> dict[str, float]:
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
        images_per_second = (step - self._step) * self._batch_size / elapsed
        out = {
            "images_per_second": images_per_second,
            "model_flops_per_second": images_per_second * self._flops_per_image,
            "input_wait_fraction": (wait_seconds - self._wait) / elapsed,
        }
        if self._peak_flops:
            out["mfu"] = out["model_flops_per_second"] / self._peak_flops
        self._time, self._step, self._wait = now, step, wait_seconds
        return out

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens inside (compiling, evaluating) out of rates and ETA."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._time += (away := time.monotonic() - began)
            self._started += away

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rewrites the progress line of a terminal, or prints one now and then elsewhere."""
        last = step >= self._total_steps
        done = step - self._start_step
        eta = (time.monotonic() - self._started) / max(done, 1) * (self._total_steps - step)
        summed, unweighted = [], []
        for term, (name, weight) in self._terms.items():
            value = f"{metrics[term]:.3f}"
            shown = f"{name} {value}" if weight in (0, 1) else f"{name} {weight:g} x {value}"
            (summed if weight else unweighted).append(shown)
        parts = [
            f"step {step}/{self._total_steps} ({step / self._total_steps:.0%})",
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
