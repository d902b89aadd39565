"""The flags of `grain-jax train`, and those of every command that may run as several processes."""

from typing import Any

from grain_jax.cli.config_parser import ConfigParser
from grain_jax.cli.values import number

HEARTBEAT_SECONDS = 100  # JAX's default
STALL_SECONDS = 1800


def parser() -> ConfigParser:
    """The parser of `grain-jax train`."""
    out = _TrainParser(
        "grain-jax train",
        more="""
The same command again goes on from the last checkpoint. After SIGTERM or Ctrl-C the run saves and ends
with status 75 or 130. Where a data set is missing and the config says how to make it (input.prepare),
it is made first.""",
        example="grain-jax train --config demo --workdir runs/demo\n"
        "grain-jax train --config own:S/16 --workdir runs/own --config.input.data_dir=records \\\n"
        "    --config.input.name=mine --config.batch_size=128",
    )
    group = out.add_argument_group("the run")
    out.add_config(group)
    group.add_argument(
        "--workdir",
        metavar="DIR",
        help="folder of the run: checkpoints, metrics, pictures; local or gs://",
    )
    out.switch(
        "--print-shardings", to=group, help="print where each array of the state lies, and stop"
    )
    group.add_argument(
        "--stall-seconds",
        metavar="S",
        type=number(int, 0),
        default=STALL_SECONDS,
        help="seconds without a step after which the run ends with status 124; 0: never",
    )
    add_compilation_cache(out)
    add_processes(out)
    out.needs = ("--config", "--workdir")
    return out


class _TrainParser(ConfigParser):
    def needed(self, found: Any) -> list[str]:
        """As ConfigParser; what --print-shardings prints needs no workdir."""
        missing = super().needed(found)
        return [f for f in missing if not (f == "--workdir" and found.print_shardings)]


def add_compilation_cache(out: Any) -> None:
    """Declares the flag of a command that compiles for long."""
    out.switch(
        "--compilation-cache",
        to=out.add_argument_group("start"),
        default=True,
        help="keep compiled programs in the user's cache folder, for the next start",
    )


def add_processes(out: Any) -> None:
    """Declares the flags of one of several processes."""
    group = out.add_argument_group(
        "several processes (TPU slices, SLURM and grain-jax local set these)"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of the first of several processes"
    )
    group.add_argument(
        "--processes",
        metavar="P",
        type=number(int, 1),
        default=1,
        help="how many processes there are",
    )
    group.add_argument(
        "--process-id",
        metavar="N",
        type=number(int, 0),
        default=0,
        help="which of them this is, from 0",
    )
    group.add_argument(
        "--heartbeat-seconds",
        metavar="S",
        type=number(int, 1),
        default=HEARTBEAT_SECONDS,
        help="seconds of silence after which a process counts as dead and the run ends",
    )
