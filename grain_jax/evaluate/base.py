"""The class that every evaluator derives from; `kinds` finds the class of an entry of `config.evals`."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from etils import epy

from grain_jax.config.keys import key

with epy.lazy_imports():
    from etils import epath  # slower to import than a config may take

TEMPLATES = "File of prompts, one per line; default: inference/templates.txt."


def option(default: Any, help: str, metavar: str = "", **declared: Any) -> Any:
    """A key that `grain-jax evaluate KIND` has as a flag; `metavar` names its value, "" for a bool.

    `declared` is as in `keys.key`, and may have more. `name` is the flag's; `required` marks data without
    which nothing is measured; `parse` makes the value from a text, or raises ValueError.
    """
    return key(default, help, metavar=metavar, **declared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """A measurement on a set of images; a subclass has its options as fields, each with a type and a default.

    `check` is called before a model is trained or loaded, `evaluate` with it; of several processes, on each.
    """

    example: ClassVar[str] = ""  # flags of the command, to copy
    lower_is_better: ClassVar[Sequence[str]] = ()  # last words of such metrics: mean_rank
    shown: ClassVar[Sequence[str]] = ()  # as well, of metrics without interval and chance in the table

    kind: str = key("", "Name of an evaluator of the package, or module:Class.")
    missing: str = key("error", "What missing data does.", choices=("error", "skip"))
    get: str | None = key(None, "How to get the data; shown if it is missing.")
    batch_size: int = key(64, "Images at a time.", low=1)

    @property
    def needs(self) -> Sequence[str]:
        """Of "regions", which a model finds, and "boxes", a box head, the ones of which it must have one."""
        return ()

    @property
    def data(self) -> tuple[str | None, ...]:
        """Paths that have to be there: required options, annotations, training images; not None and ""."""
        is_data = lambda x: x.metadata.get("required") or x.name in ("annotations", "train")
        return tuple(getattr(self, x.name) for x in dataclasses.fields(self) if is_data(x))

    @property
    def files(self) -> tuple[Any, ...]:
        """Values of which some name files: the suite measures again where such a file has changed."""
        return tuple(vars(self).values())

    @property
    def note(self) -> str:
        """A line that says what it does without data that may be missing, or ""."""
        return ""

    @abc.abstractmethod
    def check(self, model: Any = None) -> int:
        """Finds whatever would end the evaluation: options, files, and what `model`, a config.Model, lacks.

        Returns: how many images there are.
        Raises: errors.UserError, one line a fault; errors.MissingData where `missing="skip"` may skip it.
        """

    @abc.abstractmethod
    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Measures a model, an `inference.Predictor`. Raises errors.UserError, one line a fault.

        Returns: JSON-ready, the same on every process. Its numbers, also of nested dicts, become metrics; a
          number beside `KEY_low` and `KEY_high` is shown with that interval.
        """

    def finish(self, predictor: Any, result: dict[str, Any]) -> str:
        """For the command of this evaluator alone: may add to the result; returns a last line to print."""
        del predictor, result
        return ""


def how_to_get(get: str | None) -> str:
    """The end of a message about missing data."""
    return f"; to get it: {get}" if get else ""


def expanduser(path: str) -> str:
    """The path with the user's home for `~`."""
    return str(epath.Path(path).expanduser())
