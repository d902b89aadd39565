"""The class that every evaluator derives from; `kinds` finds the class of an entry of `config.evals`."""

import dataclasses
from typing import Any

from grain_jax.config import evals
from grain_jax.config.evals import (
    STANDALONE as STANDALONE,
)
from grain_jax.config.evals import (
    Context as Context,
)
from grain_jax.config.evals import (
    Evaluator as Evaluator,
)
from grain_jax.config.evals import (
    TableRow as TableRow,
)
from grain_jax.config.evals import (
    exists as exists,
)
from grain_jax.config.evals import (
    expanduser as expanduser,
)
from grain_jax.config.evals import (
    how_to_get as how_to_get,
)
from grain_jax.config.evals import (
    same_place as same_place,
)


def key(default: Any, help: str = "", **declared: Any) -> Any:
    """A key of an entry."""
    return dataclasses.field(default=default, metadata={"help": help, **declared})


def option(default: Any, help: str, metavar: str = "", **declared: Any) -> Any:
    """A key that `grain-jax evaluate KIND` has as a flag."""
    return evals.option(default, metavar, help=help, **declared)
