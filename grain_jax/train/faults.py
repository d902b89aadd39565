"""What ends a run, or warns: a loss that is not finite, texts that do not fit into their rows."""

import math
from collections.abc import Callable, Iterable, Mapping

from grain_jax.core import errors


class NotFinite(errors.UserError, ArithmeticError):
    """A loss became NaN or infinite; the message names the term and the steps."""

    status = 1  # the command was right


def check_finite(metrics: Mapping[str, float], last_good_step: int, step: int, terms: Iterable[str]) -> None:
    """Raises NotFinite with the first bad one of `metrics` at a `step`: loss `terms`, total, gradient."""
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
    """How many texts came, and what became of them: the same on every mesh and after a restart.

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
          The counts of NAMES since step 0, and shares of the texts since the last line. Of these,
          `texts_dropped_share` did not fit into rows, and `texts_too_long_share` were cut by the tokenizer.
        """
        self._new = {n: (int(metrics[n]) - self._last[n]) % 2**32 for n in self.NAMES}
        self._last = {n: self._last[n] + self._new[n] for n in self.NAMES}
        shares = {f"{n}_share": self._share(n) for n in self.NAMES[1:]}
        return {name: float(value) for name, value in self._last.items()} | shares

    def _share(self, name: str) -> float:
        return self._new[name] / max(self._new["texts"], 1)

    def _above(self, share: float) -> bool:
        """Whether more than that share was dropped, by over two standard deviations: lines may be short."""
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
