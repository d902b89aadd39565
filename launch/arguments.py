"""The flags of `grain-jax plan`, `tune`, `sweep`, `local` and `launch-files`."""

from typing import Literal

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command, Configured


class Plan(Configured, name="plan"):
    """Computes memory and speed of a run on chips that are not here.

    This machine's CPU compiles the step of grain-jax train for these chips, with libtpu for TPUs (extra tpu)
    or with JAX's CUDA plugin for GPUs (extra cuda12). The plan says whether the step fits, and lists its
    largest arrays, its FLOPs, what it sends, and the least time that it can take.

    Example:
      grain-jax plan --config grain_vitb16_cc12m --topology v5e:16x16

    the chips:
      --topology CHIP:SHAPE  v5e:16x16, v5e:16x16*2 (two slices), v6e:16x16, v4:4x4x8, v5p:4x4x4, tpu7x:4x4x4,
        h100:8x2 (GPUs per node x nodes; also h200, a100-40, a100-80, b200), gb200:72 (an NVL72 rack;
        gb200:72x2: two)
      --output OUT.json      file for the plan, beside the printed page
    """

    topology: str
    output: str | None = flag(None, also="json")


class Tune(Configured, name="tune"):
    """Measures a run on this machine and writes the fastest keys.

    It compares the program of attention with XLA's, and times their layers. Then it times whole steps with
    other programs, remat, unroll, microbatches, a key at a time, and keeps the fastest. Keys
    that the command line sets stay. At the end it compares the step with plan's bound and with the images per
    second of the input. Ctrl-C keeps what was measured.

    Example:
      grain-jax tune --config demo --output tuned.txt

    the result:
      --output FILE  file for the keys, as grain-jax train takes them: grain-jax train ... $(cat tuned.txt)
    """

    output: str = "tuned.txt"


class Sweep(Configured, name="sweep"):
    """Trains every point of a sweep and prints a table.

    sweep() in the sweep file yields the config keys that each run changes, such as {"optim.learning_rate":
    1e-3}. Every config is checked before anything starts. Each run has its own folder in the workdir, named
    after what differs. The same command resumes the sweep: it skips finished runs.

    Example:
      grain-jax sweep --config demo --sweep learning_rate --workdir runs/rates --parallel 2

    the sweep:
      --sweep FILE|NAME           Python file with sweep(), or a sweep of the package, such as learning_rate
      --workdir DIR               folder of the sweep, with a folder for each run
      --[no-]dry-run              check every point, print the commands and start nothing
      --[no-]table                only print the table of the present results
      --metric KEY                metric that ranks the runs, such as eval/unseen/top1 (default: the first
        accuracy)

    how runs are started:
      --launcher local|slurm|gke|gke-gpu  local trains here; the others write files for a cluster and print
        the command that submits them
      --parallel N                number of runs at a time (default: 1 for local, else all)
    """

    sweep: str
    workdir: str
    dry_run: bool = False
    table: bool = False
    metric: str | None = None
    launcher: Literal["local", "slurm", "gke", "gke-gpu"] = "local"
    parallel: int | None = None


class Local(Command, name="local"):
    """Runs a command as several processes on this machine.

    Each process has D virtual devices. Its lines are prefixed with its number. The launcher passes signals on
    to all processes; if it is killed itself, they get SIGTERM (on Linux). If a process fails, the launcher
    names it, ends the others and returns its status, or 128 + N after signal N. Status 75: the run was
    preempted and saved.

    Example:
      grain-jax local --processes 2 -- grain-jax train --config demo --workdir runs/demo

    processes:
      --processes P            number of processes
      --devices-per-process D  virtual devices per process
      --grace S                seconds that the other processes have to end after one failed
      -- COMMAND               grain-jax train or evaluate with its flags; --coordinator, --processes and
        --process-id are added
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
      FOLDER   folder to write; it may not hold these files yet
    """

    folder: str
