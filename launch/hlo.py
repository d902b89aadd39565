"""Reads the text of a compiled XLA program: computations, and how often a step runs each.

XLA's own `cost_analysis()` counts the body of a loop once, and says nothing of collectives. The text is
`compiled.as_text()`: optimised, partitioned (so every number is of one chip) and scheduled (so that it shows
what runs while a collective is under way). Text of the TPU compiler and of the CPU compiler is known.
"""

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# The TPU compiler cuts a collective into fusions that start it, compute meanwhile and wait; all name it.
START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
# Instructions that move no data: names for data that is there already.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier domain"
    " while conditional call async-update async-done copy-done slice-done send-done recv-done"
    " all-reduce-done all-gather-done collective-permute-done add-dependency".split()
)
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", DONE, "Sharding")
ASYNC = re.compile(r"(copy|slice)-start|send|recv|.*-done")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}", re.M | re.S)
# Name, result, opcode, operands (those of a constant may have parentheses inside), attributes.
_INSTRUCTION = re.compile(r"(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\(((?:[^()]|\([^()]*\))*)\)(.*)")
_MOST_TRIPS = 100_000  # a loop of more has an unknown length


class Shape(NamedTuple):
    """An array in the program; `layout` as printed, "{1,0:T(8,128)S(1)}" (tile, memory space), or ""."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def bytes(self) -> float:
        """Bytes of the values alone; packed types of 4 bits take half a byte."""
        bits = re.search(r"\d+", self.dtype)
        size = int(bits[0]) / 8 if bits else float(self.dtype == "pred")
        return math.prod(self.dims) * size

    @property
    def stored_bytes(self) -> float:
        """Bytes in memory, with the padding of TPU tiles: the minor axes are filled up to whole tiles."""
        order = re.match(r"\{([\d,]+):T\(([\d,]+)\)", self.layout)
        if not order or not self.dims:
            return self.bytes
        minor = [int(n) for n in order[1].split(",")]
        tile = [int(n) for n in order[2].split(",")]
        padded = list(self.dims)
        for axis, size in zip(minor, reversed(tile)):
            padded[axis] = -(-padded[axis] // size) * size
        return self.bytes / max(1, math.prod(self.dims)) * math.prod(padded)

    @property
    def in_hbm(self) -> bool:
        """Whether it is in the chip's main memory (space 0), not in the core's scratch memory."""
        return re.search(r"S\([1-9]", self.layout) is None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are the leaves of its result, `rest` the attributes as printed."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # between the parentheses: the value of a constant, the number of a parameter
    rest: str

    def find(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        match = re.search(pattern, self.rest)
        return match[1] if match else None

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.find(r'custom_call_target="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; `root` is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each name as an operand."""
        out = defaultdict(list)
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                out[name].append(instruction)
        return out


@dataclasses.dataclass(frozen=True)
class Module:
    """A program, with how often a step runs each computation."""

    computations: dict[str, Computation]  # by name, callees before callers
    entry: str  # the name of the one that is the program
    # Runs of each computation a step: loops multiply; each branch of a conditional counts as taken.
    times: dict[str, int]
    in_loop: frozenset[str]  # computations that a loop runs, directly or not
    fused: frozenset[str]  # computations that a fusion or an asynchronous wrapper runs as one instruction
    partitions: int  # chips that the program is cut over; across slices, the chips of one slice
    across_slices: bool  # whether sends through the host leave the TPU slice, over the data-centre network
    trips: dict[str, int | None]  # of each loop, by its instruction; None if unknown: its body counts once
    # Of Pallas kernels by name, the FLOPs that take their time at peak (`schedule.price`).
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def running(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """(computation, instruction, runs per step) of everything that a step runs."""
        for computation in self.computations.values():
            if times := self.times.get(computation.name):
                for instruction in computation.instructions.values():
                    yield computation, instruction, times

    def callees(self, instruction: Instruction) -> list[tuple[Computation, int]]:
        """The computations that the instruction runs, and how often it does."""
        trips = self.trips.get(instruction.name)
        times = 1 if trips is None else trips
        return [(self.computations[name], times) for name in _callees(instruction)]

    def called(self, instruction: Instruction) -> Computation | None:
        """The computation that a fusion or an asynchronous wrapper runs."""
        name = instruction.find(r"\bcalls=%([^\s,]+)")
        return self.computations[name] if name else None


def _parse_instruction(line: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(line)
    if not match:
        raise ValueError(f"HLO: no instruction in {line[:120]!r}")
    name, result, opcode, inside, rest = match.groups()
    shapes = (
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", result)
    )
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(name, opcode, tuple(shapes), operands, literal=inside, rest=rest)


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: the text is not a compiled HLO module.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    # A kernel's metadata may stand on lines of its own, unlike the one instruction of a computation.
    text = re.sub(r"\{\n(?! *(?:ROOT )?%)([^\n]*)\n\}", r"{\1}", text)
    for is_entry, name, body in _COMPUTATION.findall(re.sub(r"/\*.*?\*/", "", text)):
        lines = [line.strip() for line in body.splitlines() if " = " in line]
        parsed = [_parse_instruction(line) for line in lines]
        root = next((i for i, x in zip(parsed, lines) if x.startswith("ROOT ")), parsed[-1])
        computations[name] = Computation(name, {i.name: i for i in parsed}, root)
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("HLO: no ENTRY computation; expected the text of compiled.as_text()")

    times = Counter({entry: 1})
    in_loop, fused, trips = set(), set(), {}
    # Callers come after their callees, so that from the end every caller is complete before it is used.
    for caller in reversed(computations.values()):
        for instruction in caller.instructions.values():
            is_loop = instruction.opcode == "while"
            if is_loop and times[caller.name]:
                trips[instruction.name] = _trips(computations, caller, instruction)
            often = trips.get(instruction.name)
            for callee in _callees(instruction):
                times[callee] += times[caller.name] * (1 if often is None else often)
                if is_loop or caller.name in in_loop:
                    in_loop.add(callee)
                if instruction.opcode in ("fusion", "async-start") or caller.name in fused:
                    fused.add(callee)
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(
        computations=computations,
        entry=entry,
        times=dict(times),
        in_loop=frozenset(in_loop),
        fused=frozenset(fused),
        partitions=int(partitions[1]) if partitions else 1,
        across_slices="xla_megascale_runtime" in text,
        trips=trips,
    )


def _callees(instruction: Instruction) -> list[str]:
    """The computations that it runs; functions of one element (`to_apply`) are left out."""
    keys = {"while": "body", "call": "to_apply", "conditional": "(?:true|false)_computation"}
    key = keys.get(instruction.opcode, "calls")
    branches = instruction.find(r"branch_computations=\{([^}]*)\}") or ""
    return re.findall(r"%([^\s,]+)", branches) + re.findall(rf"\b{key}=%([^\s,]+)", instruction.rest)


def _value(computations, computation, name, inputs) -> int | None:
    """What a scalar instruction computes, if known.

    `inputs` are the parameters: values of a fusion's operands, or a loop's state, a function of the index.
    """
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        return int(instruction.literal) if instruction.literal.isdigit() else None
    if opcode == "parameter":
        return inputs[int(instruction.literal)] if inputs else None
    if opcode == "get-tuple-element":
        source = computation.instructions[operands[0]]
        entry = inputs[int(source.literal)] if inputs and source.opcode == "parameter" else None
        return entry(int(instruction.find(r"index=(\d+)"))) if callable(entry) else None
    values = [_value(computations, computation, n, inputs) for n in operands]
    if opcode == "fusion":
        inner = computations[instruction.find(r"\bcalls=%([^\s,]+)")]
        return _value(computations, inner, inner.root.name, values)
    if opcode in ("copy", "bitcast", "convert", "reshape"):
        return values[0]
    if None in values:
        return None
    if opcode == "compare" and instruction.find(r"direction=(LT)"):
        return values[0] < values[1]
    return sum(values) if opcode == "add" else None


def _trips(computations, caller: Computation, loop: Instruction) -> int | None:
    """Trips of a loop: as XLA noted them, or counted by running what its condition needs; None if unknown."""
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition, body = (computations[loop.find(rf"\b{part}=%([^\s,]+)")] for part in ("condition", "body"))

    def entries(computation, state, inputs):
        operands = state.operands if state.opcode == "tuple" else ()
        value = functools.partial(_value, computations, computation, inputs=inputs)
        return functools.cache(lambda index: value(operands[index]) if operands else None)

    state = entries(caller, caller.instructions[loop.operands[0]], None)
    for trips in range(_MOST_TRIPS):
        goes_on = _value(computations, condition, condition.root.name, [state])
        if not goes_on:
            return None if goes_on is None else trips
        state = entries(body, body.root, [state])
    return None


def is_continued(computation: Computation, instruction: Instruction) -> bool:
    """Whether it is a collective that an earlier fusion started."""
    return (
        instruction.opcode in KINDS
        and instruction.find(r'(chain_id)="') is not None
        and all(i.target != START for i in computation.instructions.values())
    )
