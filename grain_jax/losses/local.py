"""Local loss terms: those that see tokens, views and a teacher, of the images of a micro-batch.

A loss term of the table (total.py) sees embeddings of the global batch. A local term sees what is too large for that:
the tokens of the images, the features of every text token, further views, the outputs of a teacher. Its loss is a sum
over images that needs no other image's tokens, or those of a group of consecutive images (`LocalTerm.group`). So it
runs inside the forward pass of a micro-batch (training/forward.py), and its sums travel with the embeddings:

    forward pass of each part  ->  sums and counts of each image  ->  weight * sum / count over the global batch
    backward pass of each part <-  cotangents of the sums         <-

The result is that of the full batch on every mesh. Tokens are computed again in the backward pass, never stored.

    c.loss.terms.NAME = {"term": "module:Class", "weight": 0.1, "option": 2.0}

names a term, built in (`config.LOCAL_TERMS`) or a class of a user; examples/loss has one of each kind.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from grain_jax import config as config_lib
from grain_jax.core import schema
from grain_jax.losses.shard import Mean, Shard, TermOutput


class PerImage(NamedTuple):
    """A mean over all images: the sum of the values of each image, and how many it has."""

    sum: Float[Array, "B"]
    count: Float[Array, "B"]


class LocalOutput(NamedTuple):
    """What a local term gives for the images of a micro-batch."""

    loss: PerImage
    measures: Mapping[str, PerImage] = {}  # numbers to log; no gradient is taken of them
    # Embeddings [B, ...] of each image for `LocalTerm.across`, kept of the global batch as embeddings are.
    handed: Mapping[str, Array] = {}
    # Arrays for `LocalTerm.across` that are the same for all images, such as parameters of the term.
    shared: Mapping[str, Array] = {}
    # Sums over the images of the micro-batch for `LocalTerm.update`; no gradient.
    statistics: Mapping[str, Array] = {}


class Seen(NamedTuple):
    """What a local term sees of the images of a micro-batch; gradients go to the parameters of the model."""

    batch: schema.Batch  # all fields, also images, tokens and where texts lie
    tokens: Array  # [B, N, E] of the image tower, after the last norm
    hidden: (
        Array | None
    )  # [B, Q+1, E] of the last layer of the decoder; the last query is that of the image
    text_features: Array  # [G, rows, L, E] of every text token, before the last norm; [G, rows, E] of a pooled tower
    outputs: schema.Outputs  # the embeddings, of unit length
    leading: int  # tokens that stand for no place in the image
    keys: Array  # PRNG keys [B] of the images for this term and step, the same on every mesh
    # The model with its parameters: student("image_tokens", image) calls that method of models.grain.GRAIN.
    student: Callable[..., Any]
    teacher: Any  # training.teacher.Teacher, whose outputs have no gradient; None without one
    views: Any  # terms.views.Views of the images: crops, flips, colours; None without `input.views`
    state: Mapping[str, Array]  # of the term, from `LocalTerm.initial_state` and `update`
    share: Array  # float32 [], of the steps since the term came on: 0 in its first one
    # models.places.Places of the patch tokens, of images in their own shape or some of their patches; None: a full square
    places: Any = None
    text_length: int = 0  # most tokens of a text (`Config.text_length`); 0: those of a row


class LocalTerm(nn.Module):
    """A local loss term; its parameters lie below `terms/NAME`, and no export has them.

    They name their logical axes as those of a tower do (models/towers.py).

    Attributes:
      options: an instance of `Options`.
      model: `config.model` of the run.
      teacher_model: that of the teacher; None without one, or of stored embeddings.
      dtype: of activations, "float32" or "bfloat16".
      remat: what the backward pass keeps, as `config.remat`.
    """

    options: Any
    model: config_lib.Model
    teacher_model: config_lib.Model | None = None
    dtype: str = "float32"
    remat: str = "none"

    # A frozen dataclass: the keys of the term in a config, beside `term` and `weight`.
    Options: ClassVar[type] = config_lib.NoOptions
    # Whether `across` replaces the loss of `__call__`.
    is_global: ClassVar[bool] = False
    # Whether it reads `Seen.places`: patch tokens may be no full square, and some of them not real.
    any_grid: ClassVar[bool] = False

    @classmethod
    def group(cls, options: Any) -> int:
        """Consecutive images that the term needs together; it divides the images of a device's micro-batch."""
        del options
        return 1

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """What the term misses in a run, each a line such as "teacher.kind: got none, expected ..."."""
        del options, config
        return []

    @classmethod
    def advice(cls, options: Any, measures: Mapping[str, float]) -> str:
        """A line for the user about what a step measured, such as an option that does not fit the data; "" if none."""
        del options, measures
        return ""

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sums of each image."""
        raise NotImplementedError

    @staticmethod
    def across(options: Any, shard: Shard, output: LocalOutput) -> TermOutput:
        """Of a term with `is_global`: its loss over the global batch, inside `jax.shard_map`.

        Args:
          options: of the term.
          shard: the images of one device.
          output: of these images; `handed`, `shared`, `loss` and `measures` are there.
        """
        raise NotImplementedError

    def initial_state(self) -> dict[str, Array]:
        """float32 arrays that the term carries from step to step without a gradient, such as a centre."""
        return {}

    def update(
        self, state: Mapping[str, Array], statistics: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The state after a step, from the statistics summed over the global batch."""
        del statistics
        return dict(state)


def of_shard(name: str, entry: config_lib.LocalEntry, shard: Shard) -> TermOutput:
    """A local term as a term of the table (losses/total.py): its sums, or `across`."""
    found: LocalOutput = shard.outputs.local[name]
    measures = {key: _mean(value) for key, value in found.measures.items()}
    if entry.cls.is_global:
        output = entry.cls.across(entry.options, shard, found)
        return TermOutput(output.loss, {**measures, **output.measures})
    return TermOutput(_mean(found.loss), measures)


def _mean(value: PerImage) -> Mean:
    return Mean(value.sum.sum(0), value.count.sum())


def split(outputs: schema.Outputs) -> tuple[dict[str, Any], schema.Outputs]:
    """What the terms share for all images, by their names, and the outputs without it; `join` is the inverse."""
    shared = {name: output.shared for name, output in (outputs.local or {}).items()}
    return shared, join(dict.fromkeys(shared, {}), outputs)


def join(shared: Mapping[str, Any], outputs: schema.Outputs) -> schema.Outputs:
    """The outputs with what the terms share for all images."""
    if outputs.local is None:
        return outputs
    found = {name: output._replace(shared=shared[name]) for name, output in outputs.local.items()}
    return outputs._replace(local=found)


def axes_of(outputs: schema.Outputs) -> Any:
    """A tree like the outputs: for each array the axis of its images, SHARED or SUMMED."""
    axes = {}
    for name, field in schema.fields(schema.Outputs).items():
        axis = SHARED if field.image_axis is None else field.image_axis
        axes[name] = jax.tree.map(lambda _, axis=axis: axis, getattr(outputs, name))
    if outputs.local is None:
        return schema.Outputs(**axes)
    local = {
        name: LocalOutput(
            *(
                jax.tree.map(lambda _, axis=axis: axis, part)
                for part, axis in zip(output, (0, 0, 0, SHARED, SUMMED))
            )
        )
        for name, output in outputs.local.items()
    }
    return schema.Outputs(**axes)._replace(local=local)


SHARED = -1  # the same for all images
SUMMED = -2  # a sum over the images
