"""The time of Pallas kernels on a TPU: libtpu's schedule, which needs no chip, or their padded products.

A schedule has a bundle of instructions for each cycle. A chip may wait longer, so the count is a bound.
"""

import base64
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from grain_jax.launch.chips import Chip
from grain_jax.launch.hlo import Instruction, Module

PASS = "final_bundles"  # the last form of a schedule
SCHEDULE, PADDED = "libtpu's schedule", "their padded shapes"
GRID = "iteration_bounds"
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})?: *>* *\{", re.M)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)")


class _Loop(NamedTuple):
    start: int  # its first bundle
    end: int  # the bundle after its last
    trips: int


def flags(folder: epath.Path) -> str:
    """What LIBTPU_INIT_ARGS must hold when libtpu is loaded, so that it writes schedules into the folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASS}"


def texts(folder: epath.Path, names: set[str]) -> Iterator[tuple[str, str]]:
    """(name, schedule) of the instructions of these names; libtpu writes one for equal kernels."""
    for path in folder.iterdir():
        match = re.fullmatch(rf"\d+-(.+)-\d+-{PASS}\.txt", path.name)
        if match and match[1] in names:
            yield match[1], path.read_text()


def read(folder: epath.Path, hlo: str) -> dict[str, int]:
    """`cycles` of the Pallas kernels of a compiled program, by name."""
    kernels = set(re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', hlo))
    return {name: cycles(text) for name, text in texts(folder, kernels)}


def cycles(text: str) -> int:
    """The least cycles of one run of a scheduled kernel: its bundles, each as often as its loops run.

    A loop over the grid runs more often than the grid has programs, to start and to end its pipeline. What
    stands behind a condition of a program (`pl.when`) counts once. A loop of unknown length counts once.
    """
    starts = [match.start() for match in _BUNDLE.finditer(text)]
    bundles = [text[i:j] for i, j in zip(starts, [*starts[1:], len(text)])]
    loops, conditions = _control_flow(bundles)
    return sum(_runs(n, loops, conditions) for n in range(len(bundles)))


def _control_flow(bundles: list[str]) -> tuple[list[_Loop], list[tuple[int, int]]]:
    """The loops, which branches back make, and the bundles (first, end) that branches ahead may skip."""
    regions = {name: n for n, bundle in enumerate(bundles) for name in _REGION.findall(bundle)}
    loops, conditions = [], []
    for n, bundle in enumerate(bundles):
        for predicate, region in _BRANCH.findall(bundle):
            target = regions.get(region, n + 1)
            if target > n:
                conditions.append((n + 1, target))
                continue
            # The bundles behind a branch run with it, up to the end of the region.
            ends = [m for m, x in enumerate(bundles[: n + 9]) if f"End region {region} " in x]
            trips = _trips("".join(bundles[target : n + 1]), predicate)
            loops.append(_Loop(target, max([n, *ends]) + 1, trips))
    return loops, conditions


def _runs(n: int, loops: list[_Loop], conditions: list[tuple[int, int]]) -> int:
    """How often the bundle `n` runs."""
    around = sorted(loop for loop in loops if loop.start <= n < loop.end)
    if not around:
        return 1
    *outer, inner = around
    # A stage of the pipeline over the grid stands behind one condition; a second is the program's own.
    skips = sum(inner.start <= first <= n < end for first, end in conditions)
    return math.prod(loop.trips for loop in outer) * (1 if skips > 1 else inner.trips)


def _trips(body: str, predicate: str) -> int:
    """How often a loop runs what it is for: up to the constant of its exit test, without its pipeline."""
    test = re.search(rf"%{predicate} = scmp\.ge\.s32\.totalorder %(\w+), (\d+)", body)
    if not test:
        return 1
    step = re.search(rf"%{test[1]} = sadd\.s32 (\d+), ", body)
    of_grid = "/* iteration index, stage = " in body and ">>" not in body.partition("{")[0]
    surplus = 2 if of_grid else 0
    return max(1, math.ceil((int(test[2]) - surplus) / int(step[1] if step else 1)))


def padded_flops(body: str) -> float:
    """FLOPs of the matrix products of a kernel, its arrays filled up to 8 sublanes and 128 lanes.

    Args:
      body: of the kernel, MLIR bytecode in base64, as the compiled program has it.
    """
    from jax._src.lib import tpu  # no public module reads a kernel
    from jax._src.lib.mlir import ir

    def flops_of(operation, times):
        name, flops = operation.name, 0.0
        if name.endswith("scf.for"):
            low, high, step = map(_number, list(operation.operands)[:3])
            times *= max(0, -(-(high - low) // step))
        if name.endswith("tpu.matmul"):
            rows, lanes = ir.ShapedType(operation.results[0].type).shape
            depth = math.prod(ir.ShapedType(operation.operands[0].type).shape) // rows
            sizes = (rows, 8), (depth, 128), (lanes, 128)  # with the sides of the tiles that they fill
            flops = 2.0 * times * math.prod(-(-size // tile) * tile for size, tile in sizes)
        blocks = (block for region in operation.regions for block in region.blocks)
        return flops + sum(flops_of(o.operation, times) for block in blocks for o in block.operations)

    context = ir.Context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        module = ir.Module.parse(base64.b64decode(body))
        functions = [o.operation for o in module.body.operations]
        (grid,) = (f.attributes[GRID] for f in functions if GRID in f.attributes)
        return sum(flops_of(function, math.prod(grid)) for function in functions)


def _number(value) -> int:
    """A constant of MLIR, or a sum of constants."""
    made = value.owner
    if "value" in made.attributes:
        return made.attributes["value"].value
    return sum(map(_number, made.operands))


def price(module: Module, scheduled: dict[str, int], chip: Chip) -> tuple[dict[str, float], Counter[str]]:
    """The kernels by name, as the FLOPs that take their time at the chip's peak; and runs by count.

    Args:
      module: the compiled step.
      scheduled: `cycles` by the name of the instruction. An equal kernel of another name has the same.
      chip: what it runs on.
    """
    kernels = {i.name: i for _, i, _ in module.running() if i.target == "tpu_custom_call"}
    same = {_kind(kernels[name]): count for name, count in scheduled.items() if name in kernels}
    padded_of = functools.cache(padded_flops)
    priced, counts = {}, Counter()
    for _, i, times in module.running():
        if i.name not in kernels:
            continue
        padded = padded_of(i.find(r'"body":"([^"]*)"') or "")
        by_schedule = same.get(_kind(i), 0) / (chip.clock_ghz * 1e9) * chip.bf16_flops
        priced[i.name] = max(by_schedule, padded)
        counts[SCHEDULE if by_schedule >= padded else PADDED] += times
    return priced, counts


def _kind(kernel: Instruction) -> tuple:
    return kernel.name.split(".")[0], kernel.find(r'"body":"([^"]*)"'), kernel.shapes
