"""What a run does with its dataset before the first step: makes a missing one, derives open numbers."""

import shlex
import subprocess
import sys
from collections.abc import Callable

import jax

from grain_jax.config import Config
from grain_jax.core import errors
from grain_jax.input_pipeline import derived, sources
from grain_jax.runtime import ending, processes


def open_or_make(config: Config) -> sources.DataSource:
    """The source of a run; if its data is missing, the first process runs `input.prepare` before.

    Only the trainer calls this, with the config that its user passed: a stored config may come from anyone.
    """
    if jax.process_index() == 0 and config.input.prepare:
        try:
            sources.open_source(config)
        except errors.MissingData:
            words = shlex.split(config.input.prepare)
            command = ["python", "-m", *(word.format(**vars(config.input)) for word in words)]
            print(f"No dataset yet: {shlex.join(command)}", file=sys.stderr, flush=True)
            with subprocess.Popen([sys.executable, *command[1:]]) as child:
                ending.at_end(child.terminate)
                status = child.wait()
            if status:
                said = f"input.prepare: {shlex.join(command)} ended with {status}"
                raise errors.UserError(said) from None
    processes.wait_for_all("dataset prepared")
    return sources.open_source(config)


def derive(
    config: Config,
    limits: derived.Limits,
    source: sources.DataSource,
    stored: Callable[[], tuple[Config | None, str]],
) -> tuple[Config, str]:
    """`derived.resolve` for the source, on the first process for all of them.

    Args:
      config: of the user.
      limits: of the devices and processes.
      source: the dataset, opened.
      stored: returns the config of the newest checkpoint and its name; called if a number is open.

    Raises:
      UserError: no number is possible. DataError: a record cannot be read.
    """
    if not derived.is_open(config):
        return config, ""

    def resolve():
        of_data = limits._replace(shards=source.num_shards(config))
        resolved, line = derived.resolve(config, of_data, source, *stored())
        return (resolved.input.lanes, resolved.text.pack_group, resolved.text.pack_rows), line

    numbers, line = processes.of_first(resolve)
    return derived.with_numbers(config, *numbers), line
