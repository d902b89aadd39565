"""The class that every evaluator derives from; `kinds` finds the class of an entry of `config.evals`."""

import abc
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from grain_jax.config.keys import key
from grain_jax.core import errors


class Context(typing.NamedTuple):
    """What an evaluation is told beside its options."""

    batch_size: int = 64  # images at a time


STANDALONE = Context()


def option(default: Any, help: str, metavar: str = "", **declared: Any) -> Any:
    """A key that `grain-jax evaluate KIND` has as a flag.

    Args:
      default: the value without the flag.
      help: what the option does; also the help of the flag.
      metavar: what the value of the flag is called; "" for a bool.
      **declared: `low`, `high` and `choices` as in `keys.key`. `name` is the name of the flag, by default the field's.
        `required` says that the flag must be set. `parse` makes the value from a text, or raises ValueError.
    """
    return key(default, help, metavar=metavar, **declared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """A measurement on a set of images; a subclass has its options as fields, each with a type and a default.

    `faults` is called when a config is parsed, `available` and `check` before a model is loaded or trained,
    `evaluate` with the model. On several processes all of them are called on every process.
    """

    example: ClassVar[str] = ""  # flags of the command, to copy
    lower_is_better: ClassVar[Sequence[str]] = ()  # last words of such metrics: mean_rank
    shown: ClassVar[Sequence[str]] = ()  # as well, of metrics without interval and chance in the table

    kind: str = key("", "Name of an evaluator of the package, or module:Class.")
    missing: str = key("error", "What missing data does.", choices=("error", "skip"))
    get: str | None = key(None, "How to get the data; shown if it is missing.")

    @classmethod
    def of_flags(cls, **given: Any) -> typing.Self:
        """The entry of the flags that a command was given. Raises errors.UserError where they contradict each other."""
        return cls(**given)

    def on_top(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the file of the command has beside the result, on top."""
        return {}

    def keep(self, predictor: Any, result: dict[str, Any]) -> str:
        """Stores what the command leaves beside the model; returns a line about it, or ""."""
        del predictor, result
        return ""

    def faults(self) -> list[str]:
        """Options that contradict each other, without a look at files: lines that begin with the option."""
        return []

    def misses(self, model: Any) -> list[str]:
        """What a model (`config.Model`) lacks for these options: lines that begin with the option."""
        if not self.needs_regions or model.decoder is not None:
            return []
        return [
            f"kind: got {self.kind}, which needs regions, but model.decoder is None; take out the entry, or set"
            " alphas=(1.0,) in one of kind=zeroshot"
        ]

    @property
    def needs_regions(self) -> bool:
        """Whether the model must have a region decoder."""
        return False

    @property
    def data(self) -> tuple[str | None, ...]:
        """Paths of the images, and of what else has to be there; None and "" are left out."""
        return ()

    @property
    def files(self) -> tuple[str | None, ...]:
        """Paths of small files that the result depends on: the suite measures again where one has changed."""
        return ()

    def available(self) -> tuple[typing.Self, str]:
        """The entry as far as its data is there.

        Returns: the entry, and a line that says what it does without, or "".

        Raises:
          errors.MissingData: `missing` is "skip", and the data is not there; one line.
        """
        if self.missing == "skip":
            self.find_data()
        return self, ""

    def find_data(self) -> None:
        """Raises errors.MissingData, with one line, where a path of `data` is not there."""
        paths = [path for path in self.data if path]
        if self.data and not paths:
            raise errors.MissingData("no images are named" + (f"; {self.get}" if self.get else ""))
        absent = [path for path in map(expanduser, paths) if not exists(path)]
        if absent:
            raise errors.MissingData(f"{', '.join(absent)}: not there{how_to_get(self.get)}")

    @abc.abstractmethod
    def check(self) -> int:
        """Finds, without a model, whatever would end the evaluation.

        Returns: how many images there are.

        Raises:
          errors.UserError: one line a fault.
        """

    @abc.abstractmethod
    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Measures.

        Args:
          predictor: the model: an `inference.Predictor`.
          context: the batch size.

        Returns: JSON-ready, the same on every process. Its numbers, also of nested dicts, become metrics; a
          number beside `KEY_low` and `KEY_high` is shown with that interval.

        Raises:
          errors.UserError: one line a fault.
        """


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
