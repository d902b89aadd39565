"""Local loss terms, which see tokens and pixels of the images of a micro-batch.

A loss term of the table (total.py) sees embeddings of the global batch. A local term sees what is too large
for that: the tokens of the images and the features of every text token. It may own parameters, carry a state
from step to step, and apply the model to other pixels. Its loss is a sum over images that needs no other
image's tokens. So it runs inside the forward pass of a micro-batch (train/forward.py), and its sums and
counts travel with the embeddings. The loss is weight * sum / count over the global batch, and the backward
pass of each part gets the cotangents of its sums.

The result is the same as for the full batch, on every mesh. The backward pass computes tokens again; nothing
stores them.

    c.loss.terms.NAME = {"term": "module:Class", "weight": 0.1, "option": 2.0}

names a term, a class of a user; examples/loss has one of each kind.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
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
    # Sums over the images of the micro-batch for `LocalTerm.update`; no gradient.
    statistics: Mapping[str, Array] = {}


class Parameters(NamedTuple):
    """The parameters that a local term sees."""

    model: Any  # of models.grain.GRAIN
    term: Any  # its own; {} without, and while they are made


class Seen(NamedTuple):
    """What a local term sees of the images of a micro-batch; gradients go to the parameters of the model."""

    batch: schema.Batch  # all fields, also images, tokens and where texts lie
    tokens: Array  # [B, N, E] of the image tower, after the last norm
    text_hidden: Array  # [G, rows, L, E] of the text tower, before the last norm; [G, rows, E] if it pools
    outputs: schema.Outputs  # the embeddings, of unit length
    leading: int  # tokens that stand for no place in the image
    keys: Array  # PRNG keys [B] of the images for this term and step, the same on every mesh
    # apply("image_tokens", image) calls that method of models.grain.GRAIN with the parameters of the step.
    # With params=tree it takes others, such as an average in the state of the term. The tree needs only the
    # parts that the method reads.
    apply: Callable[..., Any]
    state: Any  # of the term, from `LocalTerm.initial_state` and `update`


class LocalTerm(nn.Module):
    """A local loss term; its parameters lie below `terms/NAME`, and no export has them.

    Parameters name their logical axes, as in a tower (models/towers.py).

    Attributes:
      options: an instance of `Options`.
      model: `config.model` of the run.
      dtype: of activations, "float32" or "bfloat16".
    """

    options: Any
    model: config_lib.Model
    dtype: str = "float32"

    # A frozen dataclass: the keys of the term in a config, beside `term` and `weight`.
    Options: ClassVar[type] = config_lib.NoOptions

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """What the term misses in a run, each a line such as "input.max_regions: got 0, expected ..."."""
        del options, config
        return []

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sums of each image."""
        raise NotImplementedError

    def initial_state(self, params: Parameters) -> Any:
        """A tree of arrays that the term carries from step to step without a gradient, such as an average.

        Args:
          params: of step 0. A copy of them keeps its box with logical axes, and is sharded like them. An
            array without a box becomes float32 and lies whole on every device.
        """
        del params
        return {}

    def update(self, state: Any, statistics: Mapping[str, Array], params: Parameters) -> Any:
        """The state after a step.

        Args:
          state: the state before the step.
          statistics: summed over the global batch.
          params: after the step.
        """
        del statistics, params
        return state


def of_shard(name: str, shard: Shard) -> TermOutput:
    """A local term as a term of the table (losses/total.py): its sums."""
    output: LocalOutput = shard.outputs.local[name]
    return TermOutput(_mean(output.loss), {k: _mean(value) for k, value in output.measures.items()})


def _mean(value: PerImage) -> Mean:
    return Mean(value.sum.sum(0), value.count.sum())
