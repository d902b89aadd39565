"""The entries of `config.evals` in a run: which have their data, and their numbers."""

import sys
from collections.abc import Mapping
from typing import Any

from grain_jax import config, errors
from grain_jax.config.evals import STANDALONE, Context
from grain_jax.evaluate import tables
from grain_jax.runtime import processes


def present(entries: Mapping[str, config.Evaluator]) -> dict[str, config.Evaluator]:
    """The entries whose data is there, on every process; each skipped one is a line on stderr."""
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
    """The numbers of the result of an entry, e.g. {"alpha_0.5/top1": 0.79, "chance": 0.025}.

    Raises:
      errors.UserError: the entry names files that cannot be used.
    """
    return tables.scalars(entry.evaluate(predictor, context))
