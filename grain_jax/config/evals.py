"""The entries of `config.evals`: the class that every evaluator derives from, and how its class is found.

An entry is `dict(kind="zeroshot", ...)`: the kind names a class, and the other keys are the fields of that class. A
kind is one of `NAMED`, or `module:Class` of a module that Python finds (examples/evaluator has one).
"""

import abc
import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from grain_jax.core import errors, named

# Of the package, each with its class: its options, its flags, its rows of the table and what it measures. A config
# imports it, so it imports the libraries that compute only where it measures.
NAMED = {
    "zeroshot": "grain_jax.evaluate.zeroshot:ZeroShot",
    "linear_probe": "grain_jax.evaluate.linear_probe:LinearProbe",
    "retrieval": "grain_jax.evaluate.retrieval:Retrieval",
    "grounding": "grain_jax.evaluate.grounding:Grounding",
    "boxes": "grain_jax.evaluate.box_classes:Boxes",
    "hard_negatives": "grain_jax.evaluate.hard_negatives:HardNegatives",
    "maps": "grain_jax.evaluate.maps:Maps",
    "segmentation": "grain_jax.evaluate.segmentation:Segmentation",
    "diagnostics": "grain_jax.evaluate.diagnostics:Diagnostics",
}


class Context(typing.NamedTuple):
    """What an evaluation is told beside its options."""

    batch_size: int = 64  # images at a time
    # Where a run keeps a file for this entry (an etils epath.Path), and the step of the run; None outside of a run.
    state_path: Any = None
    step: int | None = None
    predictions: Any = None  # path of a file to write, of an evaluator that `writes_predictions`


STANDALONE = Context()


class TableRow(typing.NamedTuple):
    """How the tables show a number of a result."""

    key: str  # in the result; the interval is KEY_low, KEY_high
    label: str
    chance: str | None  # the key of its chance level
    count: str  # the key of how many items it is a mean over
    unit: str  # what these items are
    is_share: bool = True  # shown as per cent


def option(default: Any, metavar: str = "", **declared: Any) -> Any:
    """A field that `grain-jax evaluate KIND` has as a flag; its comment is the help of the flag.

    Args:
      default: of the field.
      metavar: what the value of the flag is called; "" for true or false.
      **declared: `low`, `high` and `choices`, which are checked; `name`, that of the flag, where it is another than the
        field's; `required`, of the flag; and `parse`, which makes the value of a text, and raises
        ValueError.
    """
    return dataclasses.field(default=default, metadata={"metavar": metavar, **declared})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """A measurement on a set of images; a subclass has its options as fields, each with a type and a default.

    `faults` is called when a config is parsed, `available` and `check` before a model is loaded or trained,
    `evaluate` with the model. On several processes all of them are called on every process.
    """

    example: ClassVar[str] = ""  # flags of the command, to copy
    writes_predictions: ClassVar[bool] = False  # whether `evaluate` takes `Context.predictions`
    table: ClassVar[Sequence[TableRow]] = ()  # rows of the table, of an evaluator of the package
    lower_is_better: ClassVar[Sequence[str]] = ()  # last words of such metrics: mean_rank

    # Which evaluator this is: a name of the package, or module:Class.
    kind: str = ""
    # Where the data is missing: "error", or "skip" with a line that says so.
    missing: str = dataclasses.field(default="error", metadata={"choices": ("error", "skip")})
    get: str | None = None  # how to get the data, for that line

    @classmethod
    def of_flags(cls, **given: Any) -> typing.Self:
        """The entry of the flags that a command was given. Raises errors.UserError where they contradict each other."""
        return cls(**given)

    @classmethod
    def rows(cls, numbers: Mapping[str, float]) -> Sequence[TableRow]:
        """The rows of the table for the numbers of a result; those whose key is not in `numbers` are left out.

        Of an evaluator of the package; the table of another one has a row for each number.
        """
        return cls.table

    def on_top(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the file of the command has beside the result, on top."""
        return {}

    def faults(self) -> list[str]:
        """Options that contradict each other, without a look at files: lines that begin with the option."""
        return []

    def misses(self, model: Any) -> list[str]:
        """What a model (`config.Model`) lacks for these options: lines that begin with the option."""
        del model
        return []

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
          context: the batch size, and the state of the run.

        Returns: JSON-ready, the same on every process. Its numbers, also of nested dicts, become metrics; a
          number beside `KEY_low` and `KEY_high` is shown with that interval.

        Raises:
          errors.UserError: one line a fault.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotImported(Evaluator):
    """An entry of a stored config whose class may not be imported (grain_jax/core/named.py): it can be read, not run."""

    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> int:
        find(self.kind)  # raises
        return 0

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        find(self.kind)
        return {}


def find(kind: str) -> type[Evaluator]:
    """The class of that kind: one of NAMED, or `module:Class`. Raises errors.UserError, with one line."""
    place = named.find("evaluator", kind, NAMED)
    found = named.find("evaluator", place, {}) if isinstance(place, str) else place
    if not (isinstance(found, type) and issubclass(found, Evaluator)):
        raise errors.UserError(
            f"evaluator {kind!r}: expected a subclass of grain_jax.config.Evaluator"
        )
    if inspect.isabstract(found):
        lacks = ", ".join(sorted(found.__abstractmethods__))
        raise errors.UserError(f"evaluator {kind!r}: has no {lacks}; expected check and evaluate")
    return found


def how_to_get(get: str | None) -> str:
    """The end of a message about missing data."""
    return f"; to get it: {get}" if get else ""


def expanduser(path: str) -> str:
    """The path with the user's home for `~`."""
    return str(_path(path).expanduser())


def exists(path: str) -> bool:
    """Whether there is a file or folder, local or remote."""
    return _path(path).exists()


def same_place(a: str, b: str) -> bool:
    """Whether two paths are the same file or folder."""
    return _path(a).expanduser().resolve() == _path(b).expanduser().resolve()


def _path(path: str) -> Any:
    from etils import epath  # slower to import than a config may take

    return epath.Path(path)
