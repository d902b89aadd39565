"""Opens what a run needs before it computes: devices, data, what the config leaves open, evaluators."""

import functools
import sys
from typing import NamedTuple

import jax
from etils import epath

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.checkpoint import files, pretrained, states
from grain_jax.core import errors
from grain_jax.evaluate import kinds, suite
from grain_jax.evaluate.base import Evaluator
from grain_jax.input_pipeline import derived, preparation, sources, tokenizer
from grain_jax.runtime import processes
from grain_jax.train import metrics_writer, schedule, sharding


class SetUp(NamedTuple):
    """A run before it has a state, as `set_up` returns it."""

    config: config_lib.Config  # without open numbers
    derived_from: str  # how the open numbers were derived, or ""
    mesh: jax.sharding.Mesh
    source: sources.DataSource
    lanes: tuple[int, ...]  # of this process
    total_steps: int
    steps_per_epoch: float
    data: list[sources.Identity]
    evals: dict[str, Evaluator]  # whose data is there

    @property
    def terms(self) -> list[tuple[losses.LossTerm, float]]:
        """The terms of its loss and their weights."""
        return losses.terms_of(self.config.loss)


def set_up(config: config_lib.Config, workdir: epath.Path) -> SetUp:
    """Opens all that the run needs before anything is computed, and makes the dataset if it is missing.

    What needs no dataset comes first, since making one takes long.
    """
    losses.terms_of(config.loss)
    config = config.with_dtype(jax.default_backend())
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    metrics_writer.check_wandb(config.wandb)
    of_batch = sharding.batch_sharding(mesh)
    lanes_needed = sharding.lanes_needed(of_batch, config.batch_size)
    limits = derived.Limits(sharding.batch_shards(mesh), lanes_needed)
    evaluators = kinds.from_entries(config.evals, config.model)
    if not files.finished_steps(workdir):  # else they are not read
        pretrained.check(config.init)
    if config.input.source == "records" or config.evals:
        tokenizer.of_tower(config.model.text)  # raises
    source = preparation.open_or_make(config)
    stored = functools.partial(states.newest_config, workdir)
    config, derived_from = preparation.derive(config, limits, source, stored)
    data = processes.of_first(lambda: source.identities(config))
    evals = suite.present(evaluators, config.model)  # here, not after the last step
    schedule.check_best_entry(config, evals)
    assert config.input.lanes is not None  # derived
    lanes = sharding.lanes_of_process(
        of_batch, batch_size=config.batch_size, lanes=config.input.lanes, process_index=jax.process_index()
    )
    steps = resolve_steps(config, source.num_examples(config))
    newest = max(files.finished_steps(workdir), default=0)
    if newest > steps[0]:
        raise errors.UserError(
            f"total_steps: got {steps[0]}, but {workdir} has a checkpoint of step {newest}; set"
            f" --config.total_steps above {newest} to train on, or another --workdir"
        )
    if steps[1] < 1:
        tell(
            f"batch_size: {config.batch_size} is more than the {source.num_examples(config)} examples of the"
            " dataset, so a batch has some of them several times"
        )
    return SetUp(config, derived_from, mesh, source, lanes, *steps, data, evals)


def tell(text: str) -> None:
    """Prints a line; of several processes, the first does."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def resolve_steps(config: config_lib.Config, num_examples: int) -> tuple[int, float]:
    """(total steps, steps an epoch); of a mixture, an epoch is as many records as all sets have."""
    steps_per_epoch = num_examples / config.batch_size
    total = config.total_steps
    if total is None:
        total = round((config.total_epochs or 0) * steps_per_epoch)
        if total < 1:
            raise errors.UserError(
                f"total_epochs: {config.total_epochs} of {num_examples} examples are no whole batch of"
                f" {config.batch_size}; set total_steps, or a smaller batch_size"
            )
    return total, steps_per_epoch
