"""The class that every evaluator derives from; `kinds` finds the class of an entry of `config.evals`."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from grain_jax.config.keys import key
from grain_jax.core import errors


def option(default: Any, help: str, metavar: str = "", **declared: Any) -> Any:
    """A key that `grain-jax evaluate KIND` has as a flag.

    Args:
      default: the value without the flag.
      help: what the option does; also the help of the flag.
      metavar: what the value of the flag is called; "" for a bool.
      **declared: `low`, `high` and `choices` as in `keys.key`. `name`: of the flag, default the field's.
        `required` says that the flag must be set. `parse` makes the value from a text, or raises ValueError.
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
        """Parts of a model, "decoder" or "boxes", of which it must have one; () where it need not."""
        return ()

    @property
    def data(self) -> tuple[str | None, ...]:
        """Paths of the images, and of what else has to be there; None and "" are left out."""
        return ()

    @property
    def files(self) -> tuple[str | None, ...]:
        """Paths of small files that the result depends on: the suite measures again where one has changed."""
        return ()

    @property
    def note(self) -> str:
        """A line that says what it does without data that may be missing, or ""."""
        return ""

    @abc.abstractmethod
    def check(self, model: Any = None) -> int:
        """Finds whatever would end the evaluation: options, files, and what `model`, a config.Model, lacks.

        Returns: how many images there are.

        Raises:
          errors.UserError: one line a fault; errors.MissingData where `missing="skip"` may skip the entry.
        """

    @abc.abstractmethod
    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Measures a model, an `inference.Predictor`.

        Returns: JSON-ready, the same on every process. Its numbers, also of nested dicts, become metrics; a
          number beside `KEY_low` and `KEY_high` is shown with that interval.

        Raises:
          errors.UserError: one line a fault.
        """

    def finish(self, predictor: Any, result: dict[str, Any]) -> str:
        """For the command of this evaluator alone: may add to the result; returns a last line to print."""
        del predictor, result
        return ""


def find_data(entry: Evaluator) -> None:
    """Raises errors.MissingData, with one line, where a path of `entry.data` is not there."""
    paths = [path for path in entry.data if path]
    if entry.data and not paths:
        raise errors.MissingData("no images are named" + (f"; {entry.get}" if entry.get else ""))
    absent = [path for path in map(expanduser, paths) if not exists(path)]
    if absent:
        raise errors.MissingData(f"{', '.join(absent)}: not there{how_to_get(entry.get)}")


def how_to_get(get: str | None) -> str:
    """The end of a message about missing data."""
    return f"; to get it: {get}" if get else ""


def expanduser(path: str) -> str:
    """The path with the user's home for `~`."""
    return str(_path(path).expanduser())


def exists(path: str) -> bool:
    """Whether there is a file or folder, local or remote."""
    return _path(path).exists()


def _path(path: str) -> Any:
    from etils import epath  # slower to import than a config may take

    return epath.Path(path)
