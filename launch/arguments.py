"""The flags of `grain-jax plan`, `sweep`, `local` and `launch-files`."""

from typing import Literal

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command, Configured


class Plan(Configured, name="plan"):
    """Tells memory and speed of a run on chips that are not here.

    The very step that grain-jax train runs is compiled for these chips on this machine's CPU: by libtpu for TPUs (extra
    tpu), by the CUDA plugin of JAX for GPUs (extra cuda12). Prints whether it fits, its largest arrays, what it computes
    and sends, and the least time that a step can take.

    Example:
      grain-jax plan --config grain_vitb16_cc12m --topology v5e:16x16

    the chips:
      --topology CHIP:SHAPE  v5e:16x16, v5e:16x16*2 (two slices), v6e:16x16, v4:4x4x8, v5p:4x4x4, tpu7x:4x4x4, h100:8x2
        (GPUs a node x nodes; also h200, a100-40, a100-80, b200), gb200:72 (an NVL72 rack; gb200:72x2 two)
      --output OUT.json      file that the plan is also written to
    """

    topology: str
    output: str | None = flag(None, also="json")


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
      --launcher local|slurm|gke|gke-gpu  here, or by files that are written for a cluster; the command that submits
        them is printed
      --parallel N                runs at a time (default: local 1, else all)
    """

    sweep: str
    workdir: str
    dry_run: bool = False
    table: bool = False
    metric: str | None = None
    launcher: Literal["local", "slurm", "gke", "gke-gpu"] = "local"
    parallel: int | None = None


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
    command_line: list[str] = flag(name="command")


class LaunchFiles(Command, name="launch-files"):
    """Copies the files that start runs on SLURM, GKE, TPU VMs and in containers.

    The head of each file says what it needs and how it is called.

    Example:
      grain-jax launch-files cluster

    where:
      FOLDER   folder to write; none of the files may be there
    """

    folder: str
