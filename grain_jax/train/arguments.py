"""The flags of `grain-jax train`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Configured, Processes


class Train(Configured, Processes, name="train"):
    """Trains a model, or resumes from its newest checkpoint.

    The same command again goes on from the last checkpoint. After SIGTERM or Ctrl-C the run saves and ends
    with status 75 or 130. Where a data set is missing and the config says how to make it (input.prepare),
    it is made first.

    Example:
      grain-jax train --config demo --workdir runs/demo
      grain-jax train --config own:S/16 --workdir runs/own --config.input.data_dir=records \\
          --config.input.name=mine --config.batch_size=128

    the run:
      --workdir DIR             folder of the run: checkpoints, metrics, report; local or gs://
      --[no-]print-shardings    print where each array of the state lies, and stop
      --stall-seconds S         seconds without a step after which the run ends with status 124; 0: never
    """

    workdir: str = flag("", unless="--print-shardings")
    print_shardings: bool = False
    stall_seconds: int = flag(1800, low=0)
