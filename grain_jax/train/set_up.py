"""Opens what a run needs before it computes: devices, data, the numbers that the config leaves open, evaluators."""

import shlex
import subprocess
import sys
from typing import NamedTuple

import jax
from etils import epath

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.checkpoint import files, states
from grain_jax.core import errors
from grain_jax.evaluate import kinds, suite
from grain_jax.evaluate.base import Evaluator
from grain_jax.input_pipeline import derived, sources, tokenizer
from grain_jax.runtime import ending, processes
from grain_jax.train import initialise, metrics_writer, schedule, sharding


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
    def terms(self) -> list[losses.LossTerm]:
        """The terms of its loss."""
        return [term for term, _ in losses.terms_of(self.config.loss)]


def set_up(config: config_lib.Config, workdir: epath.Path) -> SetUp:
    """Opens all that the run needs before anything is computed, and makes the dataset if it is missing.

    What needs no dataset comes first, since making one takes long.
    """
    losses.terms_of(config.loss)
    evaluators = kinds.from_entries(config.evals, config.model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    metrics_writer.check_wandb(config.wandb)
    if not files.finished_steps(workdir):  # else they are not read
        initialise.check(config.init)
    if config.input.source == "records" or config.evals:
        tokenizer.of_tower(config.model.text)  # raises
    prepare_missing_data(config)
    source = sources.open_source(config)
    config, derived_from = derive(config, mesh, source, workdir)
    assert config.input.lanes is not None  # derived
    sharding.check_batch(config, mesh)
    lanes = sharding.lanes_of_process(
        sharding.batch_sharding(mesh),
        batch_size=config.batch_size,
        lanes=config.input.lanes,
        process_index=jax.process_index(),
    )
    steps = resolve_steps(config, source.num_examples(config))
    data = processes.of_first(lambda: source.identities(config))
    evals = suite.present(evaluators)  # here, not after the last step
    schedule.check_best_entry(config, evals)
    return SetUp(config, derived_from, mesh, source, lanes, *steps, data, evals)


def tell(text: str) -> None:
    """Prints a line; of several processes, the first does."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def prepare_missing_data(config: config_lib.Config) -> None:
    """Runs `input.prepare` if a record set is missing.

    Only the trainer calls this, with the config that its user passed: a stored config may come from anyone.
    """
    if jax.process_index() == 0 and config.input.prepare:
        try:
            sources.open_source(config)
        except errors.MissingData:
            words = shlex.split(config.input.prepare)
            command = ["python", "-m", *(word.format(**vars(config.input)) for word in words)]
            tell(f"No dataset yet: {shlex.join(command)}")
            with subprocess.Popen([sys.executable, *command[1:]]) as child:
                ending.at_end(child.terminate)
                status = child.wait()
            if status:
                told = f"input.prepare: {shlex.join(command)} ended with {status}"
                raise errors.UserError(told) from None
    processes.wait_for_all("dataset prepared")


def derive(
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    source: sources.DataSource,
    workdir: epath.Path,
) -> tuple[config_lib.Config, str]:
    """The config with the numbers that it leaves open (derived.py), and a line about them.

    The first process works them out, from the newest checkpoint's config that can be read where there is one.

    Raises:
      DerivedError: no numbers will do. DataError: a record cannot be read.
    """
    if not derived.is_open(config):
        return config, ""

    def resolve():
        stored, where = states.newest_config(workdir)
        place = derived.Limits(
            sharding.batch_shards(mesh),
            sharding.lanes_needed(sharding.batch_sharding(mesh), config.batch_size),
            source.num_shards(config),
        )
        lengths = lambda: source.text_lengths(config)
        found, line = derived.resolve(config, place, lengths, stored, where)
        return (found.input.lanes, found.text.pack_group, found.text.pack_rows), line

    numbers, line = processes.of_first(resolve)
    return derived.with_numbers(config, *numbers), line


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
