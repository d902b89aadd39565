"""The evaluators by name, and how an entry of `evals` in a config becomes an evaluator."""

from typing import Any

from grain_jax import config as config_lib
from grain_jax.config import evals

KINDS = evals.NAMED
find = evals.find
from_entry = config_lib.evaluator_from_dict


def suite_from_dict(value: Any) -> tuple[config_lib.Suite, dict[str, evals.Evaluator]]:
    """A suite, and its evaluators by name."""
    suite = config_lib.suite_from_dict(value)
    return suite, dict(suite.evals)
