"""The evaluators of a training run (`config.evals`): which have their data, and the numbers of their results."""

import sys
from collections.abc import Mapping
from typing import Any

from grain_jax import config
from grain_jax.config.evals import STANDALONE, Context
from grain_jax.core import errors
from grain_jax.evaluate import tables
from grain_jax.runtime import processes


def present(entries: Mapping[str, config.Evaluator]) -> dict[str, config.Evaluator]:
    """The entries whose data is there, checked; the same on every process. A skipped one is a line on stderr.

    Raises:
      errors.UserError: an entry cannot be used, or its data is not there and may not be missing; each line names it.
    """
    out = {}
    for name, entry in entries.items():
        line = ""
        try:
            found, line = processes.run_together(entry.available)
            processes.run_together(found.check)
            out[name] = found
        except errors.UserError as error:
            if not isinstance(error, errors.MissingData) or entry.missing != "skip":
                lines = str(error).split("\n")
                raise errors.UserError("\n".join(f"evals.{name}: {x}" for x in lines)) from error
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
