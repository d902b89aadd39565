"""Which steps of a run are logged, evaluated and saved, and which number the best checkpoint is chosen by."""

import dataclasses
import difflib
import math
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from grain_jax.config import Config
from grain_jax.core import errors
from grain_jax.runtime import processes


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclasses.dataclass
class Schedule:
    """Which steps are logged, evaluated and saved: by their number, and by the time of the last save."""

    config: Config
    total_steps: int
    has_evals: bool
    last_save: float = dataclasses.field(default_factory=time.monotonic)

    def saved(self) -> None:
        """A checkpoint was saved now."""
        self.last_save = time.monotonic()

    def minutes_are_over(self, minutes: float) -> bool:
        """Whether the last save is so many minutes ago, by the first process's clock; a collective."""
        return processes.of_first(lambda: time.monotonic() - self.last_save > 60 * minutes)

    def due(self, step: int, *, preempted: bool) -> Due:
        """What is due after `step` steps.

        Args:
          step: from 1 on.
          preempted: the run ends after this step, perhaps in half a minute: it is saved and not evaluated.
        """
        c, last = self.config, step == self.total_steps
        every_steps = lambda every: every > 0 and step % every == 0
        evaluates = self.has_evals and not preempted and (last or every_steps(c.eval_every))
        saves = last or preempted or every_steps(c.checkpoint_every)
        # Every evaluation is saved, so that the best one has its state.
        saves = saves or (evaluates and best_is_evaluated(c))
        logs = last or evaluates or every_steps(c.log_every)
        if logs and not saves and c.checkpoint_every_minutes:
            saves = self.minutes_are_over(c.checkpoint_every_minutes)
        return Due(logs, evaluates, saves)


def best_is_evaluated(config: Config) -> bool:
    """Whether the best checkpoint is chosen by a number of an evaluator."""
    return config.checkpoint_best_metric.startswith("eval/")


def check_best_metric(config: Config, known: Collection[str]) -> None:
    """Raises UserError where `checkpoint_best_metric` is set and none of the `known` names."""
    name = config.checkpoint_best_metric
    if name and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise errors.UserError(
            f"checkpoint_best_metric: got {name!r}, which is not measured; did you mean {near[0]!r}?"
        )


def check_best_entry(config: Config, evals: Collection[str]) -> None:
    """Raises UserError where `checkpoint_best_metric` is a number of an entry that is skipped."""
    group, _, rest = config.checkpoint_best_metric.partition("/")
    name = rest.partition("/")[0]
    if group == "eval" and name not in evals:
        raise errors.UserError(
            f"checkpoint_best_metric: got {config.checkpoint_best_metric!r}, but evals.{name} is skipped,"
            " because its data is missing"
        )


def best_metric(config: Config, values: Mapping[str, float]) -> dict[str, float] | None:
    """The number that chooses the best checkpoint, the first process's on all; None if not measured."""
    name = config.checkpoint_best_metric
    if not name:
        return None
    value = processes.of_first(lambda: values.get(name))  # rates are known to the first one only
    return None if value is None or math.isnan(value) else {name: value}
