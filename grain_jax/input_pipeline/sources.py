"""Data sources: where the batches of a run come from. `input.source` chooses one:

    "records"       the TFRecords that grain-jax build writes (records.py)
    "synthetic"     random batches (synthetic.py)
    "module:Class"  your own class with the methods of `DataSource`; start from `LaneSource`

examples/data_source has a complete source of its own. A run uses it like this:

    source = sources.open_source(config)
    for batch in source.batches(config, lanes=(0, 1), start_step=1000): ...
"""

import abc
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from grain_jax.config import Config
from grain_jax.core import errors, named
from grain_jax.core.schema import Batch

# Name -> its module, or a class in one. Imported when chosen: TensorFlow is slow to import.
_BUILT_IN = {
    "records": "grain_jax.input_pipeline.records",
    "synthetic": "grain_jax.input_pipeline.synthetic:Synthetic",
}
_METHODS = ("check", "num_examples", "identities", "num_shards", "batches")


class Identity(TypedDict):
    """What tells a dataset from others. A checkpoint holds it as JSON, and a resumed run compares."""

    name: str
    split: str
    shard_lengths: list[int]  # records of each shard
    digest: str | None  # of the content


class DataSource(Protocol):
    """What serves the batches of a run. A module with these functions is one, too.

    A source keeps no position: each batch is a function of (config, lane, step). So a checkpoint needs the
    step alone, and a resumed run sees the batches that an uninterrupted one would. The global batch consists
    of `input.lanes` equal parts, one after the other. Each process asks for the lanes whose images its
    devices hold, so the batches do not depend on the number of processes.
    """

    def check(self, config: Config) -> None:
        """Called first, before anything is compiled.

        Raises:
          MissingData: the data is not there. The trainer then runs `input.prepare` if it is set.
          UserError: the data cannot be used.
        """

    def num_examples(self, config: Config) -> int:
        """Examples that count as one epoch."""
        ...

    def identities(self, config: Config) -> list[Identity]:
        """The identity of each dataset. []: the data is a function of the config."""
        return []

    def num_shards(self, config: Config) -> Mapping[str, int]:
        """Dataset -> shards, which `input.lanes` cannot exceed. {}: any number of lanes will do."""
        return {}

    def batches(
        self, config: Config, *, lanes: Sequence[int] | None = None, start_step: int = 0
    ) -> Iterator[Batch]:
        """The part of each global batch that comes from `lanes`, from `start_step` on, endless.

        Args:
          config: `input.lanes`, `text.pack_group` and `text.pack_rows` are numbers here. To derive the rows,
            the batches of one lane are read without packing.
          lanes: ascending; the rows of a batch are in their order. None: all lanes.
          start_step: 0 for the first batch of the run.
        """
        ...


class LaneSource(DataSource):
    """A DataSource that makes one lane's part of a batch at a time: write `num_examples` and `lane_batch`.

    Unless you override other methods, the data is a function of the config, with any number of lanes.
    """

    @abc.abstractmethod
    def num_examples(self, config: Config) -> int:
        """Examples that count as one epoch."""

    @abc.abstractmethod
    def lane_batch(self, config: Config, lane: int, step: int) -> Batch:
        """The `batch_size / input.lanes` images of that lane in the batch of that step, as numpy arrays.

        The result depends on the arguments alone. `order.hash_key(config.seed, lane, step)` seeds random
        choices, and `assemble.of_examples` lays out images, texts and boxes as a Batch.
        """

    def batches(
        self, config: Config, *, lanes: Sequence[int] | None = None, start_step: int = 0
    ) -> Iterator[Batch]:
        """As DataSource.batches; joins the parts of the lanes."""
        lanes = range(num_lanes(config)) if lanes is None else lanes
        for step in itertools.count(start_step):
            parts = [self.lane_batch(config, lane, step) for lane in lanes]
            fields = zip(*parts, strict=True)
            yield Batch(*(None if x[0] is None else np.concatenate(x) for x in fields))


def num_lanes(config: Config) -> int:
    """`input.lanes` as a number; derived.resolve has set it."""
    if config.input.lanes is None:
        raise ValueError("input.lanes is None; derived.resolve gives the number")
    return config.input.lanes


def open_source(config: Config) -> DataSource:
    """The source that `input.source` names, checked.

    Raises:
      MissingData: its data is not there.
      UserError: there is no such source, or it cannot be used.
    """
    name = config.input.source
    source: Any = named.find("input.source", name, _BUILT_IN)
    if name in _BUILT_IN:
        module_name, _, attribute = source.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise errors.UserError(
                f"input.source={name} needs {error.name}: pip install 'grain_jax[data]', or take"
                " --config.input.source=synthetic"
            ) from None
        source = getattr(module, attribute)() if attribute else module
    else:
        missing = [method for method in _METHODS if not callable(getattr(source, method, None))]
        if not isinstance(source, type) or missing:
            raise errors.UserError(
                f"input.source: got {name!r}, expected a class with the methods of DataSource"
                f" (grain_jax/input_pipeline/sources.py); it lacks {', '.join(missing) or 'a class'}"
            )
        source = source()
    source.check(config)
    return source
