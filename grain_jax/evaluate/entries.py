"""The evaluators of a training run (`config.evals`): which have their data, and the numbers of their results."""

import sys
from collections.abc import Mapping
from typing import Any

from grain_jax import config, errors
from grain_jax.config.evals import STANDALONE, Context
from grain_jax.evaluate import tables
from grain_jax.runtime import processes


def present(entries: Mapping[str, config.Evaluator]) -> dict[str, config.Evaluator]:
    """The entries whose data is there, the same on every process. Prints a line on stderr for each skipped entry."""
    out = {}
    for name, entry in entries.items():
        try:
            out[name], line = processes.run_together(entry.available)
        except errors.MissingData as error:
            line = f"skipped: {error}"
        if line and processes.process_info()[0] == 0:
            print(f"evals.{name}: {line}", file=sys.stderr, flush=True)
    return out


def numbers(
    entry: config.Evaluator, predictor: Any, context: Context = STANDALONE
) -> dict[str, float]:
    """Runs an entry and returns the numbers of its result, e.g. {"alpha_0.5/top1": 0.79, "chance": 0.025}.

    Raises:
      errors.UserError: a file or an option of the entry cannot be used.
    """
    return tables.scalars(entry.evaluate(predictor, context))
