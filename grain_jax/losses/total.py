"""The table of the loss terms, and their weighted sum over a global batch (docs/method.md, Losses).

What the trainer logs, checks for NaN, prints and draws of the losses is derived from `TERMS` and `terms_of`.
To add a term: a function of a `Shard`, a row here, and its weight as a key of `config.Loss`. A term from
outside of this package is an entry of `loss.terms` (examples/loss):

    c.loss.terms.NAME = {"term": "module:name", "weight": 0.1, "option": 2.0}

It is logged as `loss_NAME`, and its further numbers as `NAME/MEASURE`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from grain_jax import config as config_lib
from grain_jax.config import Loss
from grain_jax.core import errors, schema
from grain_jax.losses import local
from grain_jax.losses.box_loss import box
from grain_jax.losses.contrastive import (
    against_texts,
    box_description,
    hard_negative,
    image_caption,
    image_description,
    region_description,
)
from grain_jax.losses.layout import AXES, GroupLayout, make_layout
from grain_jax.losses.shard import GroupMean, Mean, Term, TermOutput, make_shard


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """A row of the table."""

    name: str  # its weight is `loss.NAME`, or `loss.terms.NAME.weight`
    function: Term
    label: str  # in the charts
    short: str  # in the progress line
    prefix: str = ""  # of the names of its measures

    @property
    def metric(self) -> str:
        """Its name in metrics.jsonl."""
        return f"loss_{self.name}"


_TERMS = (
    LossTerm("image_caption", image_caption, "image to caption", "caption"),
    LossTerm("box", box, "boxes", "box"),
    LossTerm("region_description", region_description, "region to description", "region"),
    LossTerm("image_description", image_description, "image to description", "description"),
    LossTerm("box_description", box_description, "box to description", "given box"),
    LossTerm("hard_negative", hard_negative, "hard negatives", "hard"),
)
TERMS = {term.name: term for term in _TERMS}
ALWAYS_MEASURED = ("image_caption", "box", "region_description")


def labels_of(metrics: Iterable[str]) -> dict[str, str]:
    """The losses among the names of metrics, in the order of the table, and what charts call them."""
    metrics = list(metrics)
    labels = {"loss": "total"} | {term.metric: term.label for term in TERMS.values()}
    labels |= {name: name for name in metrics if name.startswith("loss_") and name not in labels}
    return {name: label for name, label in labels.items() if name in metrics}


class Losses(NamedTuple):
    """The losses of a batch, float32."""

    total: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]  # by name, without their weights
    measures: dict[str, Float[Array, "*n"]]  # further means of the terms, by name
    statistics: Mapping[str, Any] = {}  # of local terms, by name: sums over the global batch


def _function(name: str, entry: Any) -> Term | config_lib.LocalEntry:
    """What an entry of `loss.terms` names. Raises UserError: not found, or options that it does not take."""
    functions = {term.name: term.function for term in TERMS.values()}
    return config_lib.loss_term(f"loss.terms.{name}", entry, functions)


def local_entries(config: Loss) -> dict[str, config_lib.LocalEntry]:
    """The local terms of `loss.terms` by name. Raises UserError: as `terms_of`."""
    functions = {name: _function(name, entry) for name, entry in config.terms.items()}
    return {name: x for name, x in functions.items() if isinstance(x, config_lib.LocalEntry)}


def terms_of(config: Loss) -> list[tuple[LossTerm, float]]:
    """The loss terms of a run and their weights: first `TERMS`, then `loss.terms`.

    A run has each term whose weight is not 0. It also measures `ALWAYS_MEASURED` with a weight of 0, unless
    it trains `loss.terms` alone.

    Raises:
      UserError: an entry of `loss.terms` cannot be found, or has options that its term does not take.
    """
    weights = {name: getattr(config, name) for name in TERMS}
    always = ALWAYS_MEASURED if any(weights.values()) or not config.terms else ()
    terms = [(TERMS[name], w) for name, w in weights.items() if w or name in always]
    for name, entry in config.terms.items():
        function = _function(name, entry)
        if isinstance(function, config_lib.LocalEntry):
            function = functools.partial(local.of_shard, name)
        terms.append((LossTerm(name, function, name, name, f"{name}/"), entry["weight"]))
    return terms


def total_loss(
    outputs: schema.Outputs,
    batch: schema.Batch,
    config: Loss,
    *,
    reference: bool = False,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
) -> Losses:
    """All losses of the outputs for a global batch.

    Args:
      outputs: of the model.
      batch: what the outputs are for.
      config: weights and switches.
      reference: `config.reference` of the run.
      mesh: its devices share the work, or None for one device.
      batch_axes: the mesh axes, its first ones, that the leading axes of batch and outputs are sharded over.

    Raises:
      UserError: `loss.group_size` does not fit the mesh, or `loss.terms` is wrong.
    """
    shards = math.prod(mesh.shape[axis] for axis in batch_axes) if mesh is not None else 1
    layout = make_layout(batch.caption_id.shape[0], config, shards)
    terms = terms_of(config)
    functions = [term.function for term, _ in terms]
    in_run = {name for name, term in TERMS.items() if term.function in functions}
    statistics = outputs.statistics

    def of_shard(
        outputs: schema.Outputs, scales: schema.Scales, batch: schema.Batch
    ) -> dict[str, TermOutput]:
        """What each term gives on the images of one device, with a leading axis that `shard_map` joins."""
        shard = make_shard(
            outputs._replace(scales=scales), batch, config=config, layout=layout, reference=reference
        )
        with jax.named_scope("negatives"):
            shard = shard._replace(negatives=against_texts(shard, in_run))
        results = {}
        for term, _ in terms:
            with jax.named_scope(term.name):
                results[term.name] = _joinable(term.name, term.function(shard), layout)
        return results

    run = of_shard
    if mesh is not None:
        devices = mesh.devices.reshape(*layout.sizes, -1)
        loss_mesh = Mesh(devices, (*AXES, "rest"))
        platform = devices.flat[0].platform
        if platform == "tpu":  # "high" would cut float32 to TF32 on a GPU
            layout = layout._replace(precision=jax.lax.Precision(config.precision))
        if platform == "gpu":
            # JAX takes cuDNN's attention only into programs that name their devices in one mesh alone.
            loss_mesh = loss_mesh.abstract_mesh
        run = jax.shard_map(
            of_shard,
            mesh=loss_mesh,
            in_specs=(PartitionSpec(AXES), PartitionSpec(), PartitionSpec(AXES)),
            out_specs=PartitionSpec(AXES),
            # optax's Hungarian algorithm, for more than 6 regions, stops the check: "while_loop body function
            # carry input and carry output must have equal types".
            check_vma=False,
        )
    of_images = outputs._replace(scales=None, statistics={})
    results = run(of_images, outputs.scales, batch.for_losses())
    values = {term.name: _average(results[term.name].loss, layout) for term, _ in terms}
    measures = {
        term.prefix + name: _average(mean, layout)
        for term, _ in terms
        for name, mean in results[term.name].measures.items()
    }
    total = functools.reduce(operator.add, (weight * values[term.name] for term, weight in terms))
    return Losses(total, values, measures, statistics)


def _joinable(name: str, output: Mean | GroupMean | TermOutput, layout: GroupLayout) -> TermOutput:
    """What a term returned, as float32 with a leading axis for the devices.

    Raises:
      UserError: it is something else, or its sums and counts have other shapes.
    """
    if not isinstance(output, TermOutput):
        output = TermOutput(output, {})

    def checked(key, mean):
        shape = {Mean: (), GroupMean: (layout.groups_per_shard,)}.get(type(mean))
        if shape is None:
            raise errors.UserError(
                f"loss term {name!r}: its {key} is a {type(mean).__name__}, expected losses.Mean(sum, count)"
                " or losses.GroupMean(sum, count)"
            )
        shapes = jnp.shape(mean.sum), jnp.shape(mean.count)
        if shapes[1] != shape or (key == "loss" and shapes[0] != shape):
            raise errors.UserError(
                f"loss term {name!r}: the sum and count of its {key} have shapes {shapes[0]} and {shapes[1]},"
                f" expected {shape} for both: a {type(mean).__name__}"
                + (f" of {shape[0]} groups per device" if shape else "")
            )
        mean = type(mean)(*(jnp.asarray(x, jnp.float32) for x in mean))
        return mean if shape else Mean(mean.sum[None], mean.count[None])

    measures = {key: checked(key, mean) for key, mean in output.measures.items()}
    return TermOutput(checked("loss", output.loss), measures)


def _average(value: Mean | GroupMean, layout: GroupLayout) -> Float[Array, "*n"]:
    """The mean of the sums and counts of all devices."""
    total, count = value
    if isinstance(value, GroupMean):
        total, count = (x.reshape(-1, layout.shards_per_group).sum(1) for x in (total, count))
    else:
        total, count = total.sum(0), count.sum()
    means = jnp.where(
        count > 0, total / jnp.where(count > 0, count, 1), 0.0
    )  # weights may sum to less than 1
    return means.mean() if isinstance(value, GroupMean) else means
