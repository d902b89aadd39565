"""The evaluators by name, and how an entry of `evals` in a config becomes an evaluator."""

from typing import Any

from grain_jax import config as config_lib
from grain_jax.config import evals

KINDS = evals.NAMED
find = evals.find
from_entry = config_lib.evaluator_from_dict


def from_entries(entries: Any, model: Any = None) -> dict[str, evals.Evaluator]:
    """The evaluators of a parsed config, which are evaluators already."""
    del model
    return dict(entries)


def suite_from_dict(value: Any) -> dict[str, evals.Evaluator]:
    """The evaluators of a suite, by name."""
    return dict(config_lib.suite_from_dict(value).evals)


def evaluator(kind: str, images: Any = "", **options: Any) -> dict[str, Any]:
    """An entry for `evals` of a config file."""
    from grain_jax.config import recipe

    return recipe.evaluator(kind, images, **options)
