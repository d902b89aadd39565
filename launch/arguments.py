"""The flags of `grain-jax plan`, `sweep`, `local` and `launch-files`, and the assumptions of a plan."""

import argparse
import dataclasses

from grain_jax.cli.config_parser import ConfigParser
from grain_jax.cli.parser import Parser
from grain_jax.cli.values import number

LAUNCHERS = ("local", "slurm", "gke")
GRACE_SECONDS = 30  # from the request to end until a process is killed


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The assumptions of a plan besides config and topology: the flags of the same names, in SI units."""

    examples: int | None = None
    price: float | None = None
    efficiency: float = 0.5
    input_rate: float = 250.0  # images/s a core
    image_bytes: float = 55e3
    storage_rate: float = 1e9  # bytes/s a host
    timeout: float = 1800.0


def plan_parser() -> ConfigParser:
    """The parser of `grain-jax plan`."""
    default = PlanOptions()
    out = ConfigParser(
        "grain-jax plan",
        more="""
The very step that grain-jax train runs is compiled for these chips on this machine's CPU: by libtpu for TPUs (extra
tpu), by the CUDA plugin of JAX for GPUs (extra cuda12). Without that plugin a plan for GPUs is arithmetic, labelled
ESTIMATE. Prints whether it fits, what bounds its speed, what the input must deliver, and the bill.""",
        example="grain-jax plan --config grain_vitb16_cc12m --topology v5e:16x16 --price 1.2",
    )
    group = out.add_argument_group("the run and its chips")
    out.add_config(group, "grain_vitb16_cc12m")
    add = group.add_argument
    add(
        "--topology",
        metavar="CHIP:SHAPE",
        help="v5e:16x16, v5e:16x16*2 (two slices), v4:4x4x8, h100:8x2 (GPUs a node x nodes; also h200,"
        " a100-40, a100-80, b200)",
    )
    add("--output", metavar="OUT.json", help="file that the plan is also written to")
    out.switch(
        "--search",
        to=group,
        help="look for the cheapest remat that fits, what is faster with it, and the largest batch",
    )
    out.older(json="--output")
    add = out.add_argument_group("assumptions").add_argument
    add("--examples", metavar="N", type=number(int, 1, 10**12), help="examples of the data set")
    add(
        "--price",
        metavar="PRICE",
        type=number(float, 0),
        help="of a chip-hour, in your currency",
    )
    add(
        "--efficiency",
        metavar="SHARE",
        type=number(float, 0.01, 1),
        default=default.efficiency,
        help="of the peak rates that is reached, 0.01 to 1; a guess",
    )
    add(
        "--input-rate",
        metavar="R",
        type=number(float, 1e-3),
        default=default.input_rate,
        help="images/s that one host core prepares",
    )
    add(
        "--image-bytes",
        metavar="BYTES",
        type=number(float, 1),
        default=default.image_bytes,
        help="of an image as stored",
    )
    add(
        "--storage-rate",
        metavar="GB/S",
        type=number(float, 1e-6),
        default=default.storage_rate / 1e9,
        help="GB/s between a host and storage",
    )
    add(
        "--timeout",
        metavar="S",
        type=number(float, 1),
        default=default.timeout,
        help="seconds that one compile may take",
    )
    out.needs = ("--config", "--topology")
    return out


def sweep_parser() -> ConfigParser:
    """The parser of `grain-jax sweep`."""
    out = ConfigParser(
        "grain-jax sweep",
        more="""
sweep() of the sweep file yields flat overrides, such as {"optim.learning_rate": 1e-3, "seed": 1}. Every point
is checked before anything starts. Each run has a folder of its own below the workdir, named after what differs.
The same command again skips what is finished, goes on with what is not, and tabulates.""",
        example="grain-jax sweep --config demo --sweep learning_rate --workdir runs/rates --parallel 2",
    )
    group = out.add_argument_group("the sweep")
    out.add_config(group)
    add = group.add_argument
    add(
        "--sweep",
        metavar="FILE|NAME",
        help="a Python file with sweep(), or a sweep of the package, such as learning_rate",
    )
    add("--workdir", metavar="DIR", help="folder of the sweep; each run has one in it")
    out.switch(
        "--dry-run", to=group, help="check every point and print the commands, start nothing"
    )
    out.switch("--table", to=group, help="only tabulate what is there")
    add(
        "--metric",
        metavar="KEY",
        help="what the table is sorted by, such as eval/unseen/top1 (default: the first accuracy)",
    )
    add = out.add_argument_group("how runs are started").add_argument
    add("--launcher", choices=LAUNCHERS, default="local", help="where the runs are trained")
    add(
        "--parallel",
        metavar="N",
        type=number(int, 1),
        help="runs at a time (default: local 1, else all)",
    )
    add(
        "--retries",
        metavar="N",
        type=number(int, 0),
        default=1,
        help="how often a local run that fails is started again",
    )
    out.needs = ("--config", "--sweep", "--workdir")
    return out


def local_parser() -> Parser:
    """The parser of `grain-jax local`."""
    out = Parser(
        "grain-jax local",
        more="""
Each process has D virtual devices and serves its share of the lanes. Lines are prefixed with the process's
number. A signal to the launcher goes to every process; where the launcher itself is killed, they get SIGTERM
(on Linux). The first process that fails is named, the others are ended, and its status is the launcher's:
128 + N after signal N. Where the run was preempted, it is 75.""",
        example="grain-jax local --processes 2 -- grain-jax train --config demo --workdir runs/demo",
    )
    add = out.add_argument_group("processes").add_argument
    add(
        "command",
        metavar="-- COMMAND",
        nargs=argparse.REMAINDER,
        help="grain-jax train or evaluate with its flags; --coordinator, --processes and --process-id are added",
    )
    add("--processes", metavar="P", type=number(int, 1), required=True, help="how many to start")
    add(
        "--devices-per-process",
        metavar="D",
        type=number(int, 1),
        default=1,
        help="virtual devices of each",
    )
    add(
        "--grace",
        metavar="S",
        type=number(float, 0),
        default=GRACE_SECONDS,
        help="seconds that the others have to end in once a process failed",
    )
    return out


def files_parser() -> Parser:
    """The parser of `grain-jax launch-files`."""
    out = Parser(
        "grain-jax launch-files",
        more="The head of each file says what it needs and how it is called.",
        example="grain-jax launch-files cluster",
    )
    out.add_argument(
        "folder", metavar="DIR", help="folder to write; none of the files may be there"
    )
    return out
