"""Data sources: where the batches of a run come from, chosen by `input.source`.

A source is "records" (TFDS-format TFRecords), "synthetic" (random), or a class of a user, `module:Class`, that
follows `DataSource`; `LaneSource` is the short way to write one. examples/data_source has one.

    source = sources.open_source(config)
    for batch in source.batches(config, lanes=(0, 1), start_step=1000): ...
"""

import abc
import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast

import numpy as np
from etils import epath

from grain_jax.config import Config
from grain_jax.core import errors, named
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline.text_lengths import TextLengths

# Name -> the module, or class in one, that is the source; imported when it is chosen (records need TensorFlow).
BUILT_IN = {
    "records": "grain_jax.input_pipeline.records",
    "synthetic": "grain_jax.input_pipeline.synthetic:Synthetic",
}

_METHODS = ("check", "num_examples", "identities", "num_shards", "text_lengths", "batches")


class Identity(TypedDict):
    """What tells a data set from others; a checkpoint holds it as JSON, and a resumed run compares."""

    name: str
    split: str
    shard_lengths: list[int]  # records of each shard
    digest: str | None  # of the content
    digest_of: str  # what of the content, in a word; digests of different things are not compared


class DataSource(Protocol):
    """What serves the batches of a run. A module with these functions is one, too.

    A source keeps no position: each batch is a function of (config, lane, step). So a checkpoint needs the step
    alone, and a resumed run sees the batches that an uninterrupted one would. The global batch consists of
    `input.lanes` equal parts, one after the other; each process asks for the lanes whose images its devices
    hold, whatever their number, so the batches do not depend on how many processes there are.
    """

    def check(self, config: Config) -> None:
        """Called first, before anything is compiled.

        Raises:
          MissingData: the data is not there; `input.prepare`, where it is set, is run then.
          UserError: the data cannot be used.
        """

    def num_examples(self, config: Config) -> int:
        """Examples that count as one epoch."""
        ...

    def identities(self, config: Config) -> list[Identity]:
        """That of each data set. []: the data is a function of the config."""
        return []

    def num_shards(self, config: Config) -> Mapping[str, int]:
        """Data set -> shards, which `input.lanes` cannot exceed. {}: any number of lanes will do."""
        return {}

    def text_lengths(self, config: Config) -> list[TextLengths]:
        """Lengths of a sample of the texts, of each data set; `text.pack_rows` is derived from them.

        Raises:
          UserError: no rows can be derived.
        """
        raise errors.UserError(
            f"text.pack_rows: got None, but input.source={config.input.source} does not tell the lengths of"
            " its texts; set text.pack_group and text.pack_rows, or text.packing=False"
        )

    def batches(
        self, config: Config, *, lanes: Sequence[int] | None = None, start_step: int = 0
    ) -> Iterator[Batch]:
        """The part of each global batch that comes from `lanes` (None: all of it), from `start_step` on, endless.

        Args:
          config: `input.lanes`, `text.pack_group` and `text.pack_rows` are numbers here.
          lanes: ascending; the rows of a batch are in their order.
          start_step: 0 for the first batch of the run.

        A method that takes `notes`, too, gets a folder of the run (None outside of one), where it may keep what it
        found, to compare when the run is resumed; the records do.
        """
        ...


class LaneSource(DataSource):
    """A DataSource that makes the part of a batch of one lane at a time: implement `num_examples` and `lane_batch`.

    Its data is a function of the config, of any number of lanes, unless its other methods say otherwise.
    """

    @abc.abstractmethod
    def num_examples(self, config: Config) -> int:
        """Examples that count as one epoch."""

    @abc.abstractmethod
    def lane_batch(self, config: Config, lane: int, step: int) -> Batch:
        """The `batch_size / input.lanes` images of that lane in the batch of that step, as numpy arrays.

        A function of the arguments alone; `order.hash_key(config.seed, lane, step)` seeds random choices, and
        `assemble.of_examples` lays out images, texts and boxes as a Batch.
        """

    def batches(
        self, config: Config, *, lanes: Sequence[int] | None = None, start_step: int = 0
    ) -> Iterator[Batch]:
        """As DataSource.batches, each put together of the lanes' parts."""
        served = range(num_lanes(config)) if lanes is None else lanes
        for step in itertools.count(start_step):
            parts = [self.lane_batch(config, lane, step) for lane in served]
            yield Batch(*map(_joined, zip(*parts, strict=True)))


def _joined(parts: Sequence[Any]) -> Any:
    """A field of a batch from its lanes' parts: arrays, or None in each part."""
    return None if parts[0] is None else np.concatenate(parts)


def batches_of_run(
    source: DataSource, config: Config, *, notes: epath.Path, **arguments: Any
) -> Iterator[Batch]:
    """`source.batches` with the `arguments`, and with `notes` where it takes them.

    Raises, where a batch of a source of one's own is asked for:
      UserError: its images have not the shape that the config says.
    """
    if "notes" in inspect.signature(source.batches).parameters:
        arguments["notes"] = notes
    batches = source.batches(config, **arguments)
    if config.input.source in BUILT_IN:
        return batches
    return _in_shape(batches, config, arguments.get("start_step", 0))


def _in_shape(batches: Iterator[Batch], config: Config, start_step: int) -> Iterator[Batch]:
    """The batches from `start_step` on; one whose images have another shape than the config says ends it in a line."""
    size = config.model.image.image_size
    for step, batch in enumerate(batches, start_step):
        got, expected = batch.image.shape[1:], (size, size, 3)
        if got != expected:
            raise errors.UserError(
                f"input.source: {config.input.source}: got images [B, {', '.join(map(str, got))}] in step {step}, expected"
                f" [B, {size}, {size}, 3] by model.image.image_size; assemble.of_examples makes such batches"
            )
        yield batch


def num_lanes(config: Config) -> int:
    """`input.lanes` where it is a number, as `derived.resolve` makes it."""
    if config.input.lanes is None:
        raise ValueError("input.lanes is None; derived.resolve gives the number")
    return config.input.lanes


def of(config: Config) -> DataSource:
    """The source that `input.source` names; its data is not looked at.

    Raises:
      UserError: there is no such source, or what it needs is not installed.
    """
    name = config.input.source
    found = named.find("input.source", name, BUILT_IN)
    if name not in BUILT_IN:
        missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
        if not isinstance(found, type) or missing:
            raise errors.UserError(
                f"input.source: got {name!r}, expected a class with the methods of DataSource"
                f" (grain_jax/input_pipeline/sources.py); it lacks {', '.join(missing) or 'a class'}"
            )
        return found()
    try:  # TensorFlow: not on every machine, and slow to import
        module, _, cls = found.partition(":")
        source = importlib.import_module(module)
        return getattr(source, cls)() if cls else cast(DataSource, source)
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"input.source={name} needs {error.name}: pip install 'grain_jax[data]', or take"
            " --config.input.source=synthetic"
        ) from None


def open_source(config: Config) -> DataSource:
    """The source that `input.source` names, checked.

    Raises:
      MissingData: its data is not there.
      UserError: it cannot be used.
    """
    source = of(config)
    source.check(config)
    return source
