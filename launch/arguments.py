"""The flags of `grain-jax plan`, `sweep`, `local` and `launch-files`, and the assumptions of a plan."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from grain_jax.cli.flags import flag, number
from grain_jax.cli.parser import Command, Configured


def _prices(text: str) -> dict[str, float]:
    """Chip -> price of an hour of "v5e=1.2,v6e=2.7"; "" stands for every other chip. Raises ValueError."""
    found = {}
    for part in text.split(","):
        chip, _, price = part.rpartition("=")
        found[chip.strip()] = number(float, 0)(price)
    return found


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The assumptions of a plan besides config and topology, in SI units.

    assumptions:
      --examples N         examples of the data set
      --price PRICE        of a chip-hour, in your currency; v5e=1.2,v6e=2.7 of each chip (default: none, no cost)
      --efficiency SHARE   of the peak rates that is reached, 0.01 to 1; a guess
      --input-rate R       images/s that one host core prepares
      --image-bytes BYTES  of an image as stored
      --storage-rate GB/S  GB/s between a host and storage (default: 1)
      --timeout S          seconds that one compile may take
    """

    examples: int | None = flag(None, high=10**12)
    price: Mapping[str, float] | None = flag(None, parse=_prices)
    efficiency: float = flag(0.5, low=0.01, high=1)
    input_rate: float = flag(250.0, low=1e-3)
    image_bytes: float = flag(55e3, low=1)
    storage_rate: float = flag(1e9, parse=lambda text: 1e9 * number(float, 1e-6)(text))  # bytes/s
    timeout: float = flag(1800.0, low=1)

    def price_of(self, chip: str) -> float | None:
        """Of an hour of that chip; None where none was given."""
        prices = self.price or {}
        return prices.get(chip, prices.get(""))


class Plan(Configured, name="plan"):
    """Tells memory, speed and price of a run on chips that are not here.

    The very step that grain-jax train runs is compiled for these chips on this machine's CPU: by libtpu for TPUs (extra
    tpu), by the CUDA plugin of JAX for GPUs (extra cuda12). Without that plugin a plan for GPUs is arithmetic, labelled
    ESTIMATE. Prints whether it fits, what bounds its speed, what the input must deliver, and the bill.

    Example:
      grain-jax plan --config grain_vitb16_cc12m --topology v5e:16x16 --price 1.2

    the chips:
      --topology CHIP:SHAPE  v5e:16x16, v5e:16x16*2 (two slices), v6e:16x16, v4:4x4x8, v5p:4x4x4, tpu7x:4x4x4, h100:8x2
        (GPUs a node x nodes; also h200, a100-40, a100-80, b200), gb200:72 (an NVL72 rack; gb200:72x2 two)
      --[no-]all-chips       plan for one topology of each kind, and print one table
      --images-per-device N  a step, instead of the config's batch_size; a device is a chip, of tpu7x half a chip
      --output OUT.json      file that the plan is also written to; with --all-chips what is there already, of the same
        config and versions, is not planned again
      --[no-]search          look for the cheapest remat that fits, what is faster with it, and the largest batch
    """

    topology: str | None = flag(None, unless="--all-chips")
    all_chips: bool = False
    images_per_device: int | None = None
    output: str | None = flag(None, also="json")
    search: bool = False
    assumptions: PlanOptions = PlanOptions()

    def __post_init__(self):
        if self.all_chips and (self.topology is not None or self.search):
            other = "--search" if self.topology is None else "--topology"
            raise ValueError(f"got --all-chips and {other}, expected one of them")


class Sweep(Configured, name="sweep"):
    """Trains every point of a sweep, and tabulates.

    sweep() of the sweep file yields flat overrides, such as {"optim.learning_rate": 1e-3, "seed": 1}. Every point
    is checked before anything starts. Each run has a folder of its own below the workdir, named after what differs.
    The same command again skips what is finished, goes on with what is not, and tabulates.

    Example:
      grain-jax sweep --config demo --sweep learning_rate --workdir runs/rates --parallel 2

    the sweep:
      --sweep FILE|NAME           a Python file with sweep(), or a sweep of the package, such as learning_rate
      --workdir DIR               folder of the sweep; each run has one in it
      --[no-]dry-run              check every point and print the commands, start nothing
      --[no-]table                only tabulate what is there
      --metric KEY                what the table is sorted by, such as eval/unseen/top1 (default: the first accuracy)

    how runs are started:
      --launcher local|slurm|gke  where the runs are trained
      --parallel N                runs at a time (default: local 1, else all)
      --retries N                 how often a local run that fails is started again
    """

    sweep: str
    workdir: str
    dry_run: bool = False
    table: bool = False
    metric: str | None = None
    launcher: Literal["local", "slurm", "gke"] = "local"
    parallel: int | None = None
    retries: int = flag(1, low=0)


class Local(Command, name="local"):
    """Starts a command as several processes on this machine.

    Each process has D virtual devices and serves its share of the lanes. Lines are prefixed with the process's
    number. A signal to the launcher goes to every process; where the launcher itself is killed, they get SIGTERM
    (on Linux). The first process that fails is named, the others are ended, and its status is the launcher's:
    128 + N after signal N. Where the run was preempted, it is 75.

    Example:
      grain-jax local --processes 2 -- grain-jax train --config demo --workdir runs/demo

    processes:
      --processes P            how many to start
      --devices-per-process D  virtual devices of each
      --grace S                seconds that the others have to end in once a process failed
      -- COMMAND               grain-jax train or evaluate with its flags; --coordinator, --processes and --process-id
        are added
    """

    processes: int
    devices_per_process: int = 1
    grace: float = flag(30.0, low=0)
    words: list[str] = flag(name="command")


class LaunchFiles(Command, name="launch-files"):
    """Copies the files that start runs on SLURM, GKE, TPU VMs and in containers.

    The head of each file says what it needs and how it is called.

    Example:
      grain-jax launch-files cluster

    where:
      FOLDER   folder to write; none of the files may be there
    """

    folder: str
