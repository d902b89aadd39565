"""Reads the text of a compiled XLA program: collectives, matrix FLOPs and memory traffic, loops multiplied out.

XLA's own `cost_analysis()` counts the body of a loop once, and says nothing of collectives. The text that is
read is `compiled.as_text()`: optimised, partitioned (so every number is of one chip) and scheduled (so that what
runs while a collective is under way can be seen). Text of the TPU compiler and of the CPU compiler is known.
"""

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# The TPU compiler cuts a collective into fusions that start it, compute meanwhile and wait; all three name it.
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
# Instructions that move no data: names for data that is there already.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier domain"
    " while conditional call async-update async-done copy-done slice-done send-done recv-done"
    " all-reduce-done all-gather-done collective-permute-done add-dependency".split()
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", _DONE, "Sharding")
_ASYNC = re.compile(r"(copy|slice)-start|send|recv|.*-done")
_SMALL = 1024  # bytes: an instruction on less than this hides nothing


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
        """Whether it lies in the chip's main memory (space 0), not in a scratch memory inside of the core."""
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
    def op_name(self) -> str:
        """Where it comes from in the JAX program; its own name where XLA made it."""
        return (self.find(r'op_name="([^"]*)"') or self.name).replace("\\'", "'")

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

    def shapes(self, instruction: Instruction) -> list[Shape]:
        """Of the operands, tuples flattened."""
        return [s for name in instruction.operands for s in self.instructions[name].shapes]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
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
    """A program, with how often a step runs each computation.

    Attributes:
      computations: by name, callees before callers.
      entry: the name of the one that is the program.
      times: runs of each computation a step (loops multiplied; each branch of a conditional counts as taken).
      in_loop: computations that a loop runs, directly or not.
      fused: computations that a fusion or an asynchronous wrapper runs as one instruction.
      partitions: chips that the program is cut over; of TPU slices that the data-centre network joins, the chips
        of one slice.
      across_slices: whether it is such a program, in which sends through the host leave the slice.
      unknown_loops: loops whose trips were not found; their bodies are counted once.
    """

    computations: dict[str, Computation]
    entry: str
    times: dict[str, int]
    in_loop: frozenset[str]
    fused: frozenset[str]
    partitions: int
    across_slices: bool
    unknown_loops: tuple[str, ...]

    def called(self, instruction: Instruction) -> Computation | None:
        """What a fusion or an asynchronous wrapper runs."""
        name = instruction.find(r"\bcalls=%([^\s,]+)")
        return self.computations[name] if name else None


class Collective(NamedTuple):
    """Collectives of one sort, summed over a step.

    Attributes:
      kind: one of KINDS.
      overlapped: whether the schedule runs other work between its start and its end.
      in_loop: whether a loop repeats it.
      group_size: chips that take part together (of a permutation: length of the ring).
      slices: slices that a group spans; above 1 it goes over the data-centre network.
      axes: mesh axes that it runs along, where the mesh was given.
      count: runs a step.
      bytes: payload of one chip, all runs together: the array that all chips of a group hold together at its
        largest (all-reduce, reduce-scatter, all-to-all, permutation: the operand; all-gather: the result).
    """

    kind: str
    overlapped: bool
    in_loop: bool
    group_size: int
    slices: int
    axes: tuple[str, ...]
    count: int
    bytes: float


class Buffer(NamedTuple):
    """A result that lies in the chip's main memory; `bytes` as stored, with padding."""

    bytes: float
    shape: str
    opcode: str
    op_name: str


def _balanced(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    raise ValueError(f"HLO: no closing parenthesis in {text[:120]!r}")


def _parse_shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", text)
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in found
    )


def _parse_instruction(line: str) -> Instruction:
    name, _, text = line.removeprefix("ROOT ").partition(" = ")
    end = _balanced(text, 0) if text[0] == "(" else text.index(" ")
    opening = text.index("(", end)
    closing = _balanced(text, opening)
    inside = text[opening + 1 : closing - 1]
    return Instruction(
        name=name.removeprefix("%"),
        opcode=text[end:opening].strip(),
        shapes=_parse_shapes(text[:end]),
        operands=tuple(re.findall(r"%([^\s,()]+)", inside)),
        literal=inside,
        rest=text[closing:],
    )


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: the text is not a compiled HLO module.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    lines: dict[str, Instruction] = {}
    root = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        heading = re.match(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .* \{$", line)
        if heading:
            name, lines, root = heading[2], {}, None
            entry = name if heading[1] else entry
        elif line.startswith("}") and name and lines:
            computations[name] = Computation(name, lines, root or list(lines.values())[-1])
            name = None
        elif name and " = " in line:
            instruction = _parse_instruction(line.strip())
            lines[instruction.name] = instruction
            root = instruction if line.lstrip().startswith("ROOT ") else root
    if entry is None:
        raise ValueError("HLO: no ENTRY computation; expected the text of compiled.as_text()")

    times = Counter({entry: 1})
    in_loop, fused, unknown = set(), set(), []
    # Callers come after their callees, so that from the end every caller is complete before it is used.
    for caller in reversed(list(computations)):
        for instruction in computations[caller].instructions.values():
            for callee, is_body in _callees(instruction):
                trips = 1
                if is_body:
                    found = _trips(computations, computations[caller], instruction)
                    if found is None and times[caller]:
                        unknown.append(instruction.name)
                    trips = 1 if found is None else found
                times[callee] += times[caller] * trips
                if is_body or caller in in_loop:
                    in_loop.add(callee)
                if instruction.opcode in ("fusion", "async-start") or caller in fused:
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
        unknown_loops=tuple(unknown),
    )


def _callees(instruction: Instruction) -> list[tuple[str, bool]]:
    """(computation, whether it is the body of a loop); functions of one element (`to_apply`) are left out."""
    rest = instruction.rest
    if instruction.opcode == "while":
        return [(instruction.find(r"\bbody=%([^\s,]+)"), True)]
    if instruction.opcode == "call":
        return [(name, False) for name in re.findall(r"\bto_apply=%([^\s,]+)", rest)]
    if instruction.opcode == "conditional":
        branches = instruction.find(r"branch_computations=\{([^}]*)\}") or ""
        names = re.findall(r"%([^\s,]+)", branches)
        names += re.findall(r"(?:true|false)_computation=%([^\s,]+)", rest)
        return [(name, False) for name in names]
    return [(name, False) for name in re.findall(r"\bcalls=%([^\s,]+)", rest)]


class _Value(NamedTuple):
    """A loop counter as far as it is known: entry `slot` of the loop's state (None: a constant) plus `offset`."""

    slot: int | None
    offset: int


def _value(computations, computation, name, arguments=None) -> _Value | None:
    """Follows copies, sums and fusions back to constants and the state; `arguments` are a fusion's operands."""
    instruction = computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "constant":
        return _Value(None, int(instruction.literal)) if instruction.literal.isdigit() else None
    if opcode == "parameter":
        return arguments[int(instruction.literal)] if arguments else None
    if opcode == "get-tuple-element":
        source = computation.instructions[instruction.operands[0]]
        index = int(instruction.find(r"index=(\d+)"))
        return _Value(index, 0) if source.opcode == "parameter" else None
    inputs = [_value(computations, computation, n, arguments) for n in instruction.operands]
    if opcode == "fusion":
        inner = computations[instruction.find(r"\bcalls=%([^\s,]+)")]
        return _value(computations, inner, inner.root.name, inputs)
    if opcode in ("copy", "bitcast", "convert", "reshape"):
        return inputs[0]
    if opcode == "add" and None not in inputs:
        for one, other in (inputs, inputs[::-1]):
            if other.slot is None:
                return _Value(one.slot, one.offset + other.offset)
    return None


def _trips(computations, caller: Computation, loop: Instruction) -> int | None:
    """Trips of a loop: as XLA noted them, or from a counter's start, step and limit; None where not known."""
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = computations[loop.find(r"\bcondition=%([^\s,]+)")]
    body = computations[loop.find(r"\bbody=%([^\s,]+)")]
    state = caller.instructions[loop.operands[0]]
    test, inputs = condition.root, None
    if test.opcode == "fusion":
        inputs = [_value(computations, condition, n) for n in test.operands]
        condition = computations[test.find(r"\bcalls=%([^\s,]+)")]
        test = condition.root
    if not (test.opcode == "compare" and test.find(r"direction=(LT)")):
        return None
    counter, limit = (_value(computations, condition, n, inputs) for n in test.operands)
    if not (counter and limit and counter.slot is not None and limit.slot is None):
        return None
    if not state.opcode == body.root.opcode == "tuple":
        return None
    start = _value(computations, caller, state.operands[counter.slot])
    following = _value(computations, body, body.root.operands[counter.slot])
    if start is None or start.slot is not None or following is None:
        return None
    if following.slot != counter.slot or following.offset <= 0:
        return None
    return max(0, math.ceil((limit.offset - counter.offset - start.offset) / following.offset))


def _groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """The chips of each group, as positions in the mesh; of a permutation the (source, target) pairs."""
    rest = instruction.rest
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", rest)
    if pairs:
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,\s]+)\}", pairs[1])]
    if re.search(r"replica_groups=\{\}", rest) or "replica_groups=" not in rest:
        return [list(range(partitions))]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _iota(iota[2]).reshape(_ints(iota[1])).tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{(['\w,]*)\}", rest
    )
    if mesh is None:
        raise ValueError(f"HLO: replica groups of an unknown form in {rest[:200]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
    ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
    ids = np.moveaxis(ids.reshape(list(sizes.values())), axes, range(-len(axes), 0))
    return ids.reshape(-1, math.prod(ids.shape[-len(axes) :])).tolist()


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Reads "[8]" or "[4,2]T(1,0)": 0, 1, 2, ... in that shape, transposed; flat."""
    shape, _, order = text.partition("T")
    dims = _ints(shape.strip("[]"))
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(_ints(order.strip("()"))) if order else ids).ravel()


def _ring(pairs: list[list[int]]) -> int:
    """Chips of the ring, or of the chain, that begins with the first pair."""
    targets, at, seen = dict(pairs), pairs[0][0], set()
    while at is not None and at not in seen:
        seen.add(at)
        at = targets.get(at)
    return len(seen)


def _is_work(module: Module, computation: Computation, instruction: Instruction) -> bool:
    """Whether it keeps the chip busy enough to hide a transfer."""
    if instruction.opcode in _FREE - {"while", "call", "conditional"}:
        return False
    if _ASYNC.fullmatch(instruction.opcode) or instruction.opcode.endswith("-start"):
        return False
    if instruction.target in _FREE_CALLS:
        return False
    inner = module.called(instruction)
    if inner and inner.root.target in (_START, _DONE):
        return False
    shapes = [*instruction.shapes, *computation.shapes(instruction)]
    return max((s.bytes for s in shapes), default=0) > _SMALL


def _overlapped(module, computation, start: Instruction, done: str | None) -> bool:
    """Whether work is scheduled between `start` and the instruction named `done`."""
    order = list(computation.instructions.values())
    first = order.index(start) + 1
    last = order.index(computation.instructions[done]) if done else first
    return any(_is_work(module, computation, i) for i in order[first:last])


def _end(module: Module, computation: Computation, start: Instruction) -> str | None:
    """The instruction that waits for `start`."""
    if start.opcode == "fusion":  # TPU: start, compute and wait are fusions that share a channel
        channel = _channel(module, start)
        return next(
            (
                i.name
                for i in computation.instructions.values()
                if i.opcode == "fusion"
                and module.called(i).root.target == _DONE
                and _channel(module, i) == channel
            ),
            None,
        )
    if start.opcode == "send":
        key = r'_xla_host_transfer_rendezvous="([^"]*)"'
        for i in computation.instructions.values():
            if i.opcode == "recv" and i.find(key) == start.find(key):
                return next((u.name for u in computation.users[i.name]), None)
        return None
    for user in computation.users[start.name]:
        if user.opcode == "async-update":
            return _end(module, computation, user)
        if user.opcode.endswith("-done"):
            return user.name
    return None


def _channel(module: Module, fusion: Instruction) -> str | None:
    inner = module.called(fusion).instructions.values()
    return next((i.find(r"channel_id=(\d+)") for i in inner if i.opcode in KINDS), None)


def _is_continued(computation: Computation, instruction: Instruction) -> bool:
    """Whether it is a collective that a fusion before this one has started."""
    return (
        instruction.opcode in KINDS
        and instruction.find(r'(chain_id)="') is not None
        and all(i.target != _START for i in computation.instructions.values())
    )


def _issued(module: Module, computation: Computation, instruction: Instruction):
    """(kind, the collective itself, where it stands, asynchronous) if `instruction` issues one, else None."""
    opcode = instruction.opcode
    if opcode in KINDS:
        return opcode, instruction, computation, False
    if opcode.removesuffix("-start") in KINDS:
        return opcode.removesuffix("-start"), instruction, computation, True
    if opcode not in ("fusion", "async-start"):
        return None
    inner = module.called(instruction)
    found = [i for i in inner.instructions.values() if i.opcode in KINDS]
    if not found:
        return None
    collective = found[0]
    if _is_continued(inner, collective):
        return None
    kind = collective.opcode
    if kind == "all-reduce" and any(
        i.opcode == "dynamic-slice" for i in inner.instructions.values()
    ):
        kind = "reduce-scatter"  # the TPU compiler's own fusion of the two
    return kind, collective, inner, opcode == "async-start" or inner.root.target == _START


def collectives(
    module: Module, *, mesh: Mapping[str, int] | None = None, slices: int = 1
) -> list[Collective]:
    """Every collective of a step, summed by sort; the largest payload first.

    Args:
      module: the program.
      mesh: axis name -> size, in the order of the mesh, to name the axes; chips are numbered as in
        `mesh.devices.flat`.
      slices: equal slices (or GPU nodes) that the chips lie in, each a run of consecutive chips of the mesh.
    """
    per_slice = max(1, module.partitions // slices)
    if module.across_slices:  # the text is of one slice: its groups stay within, its sends leave
        per_slice = module.partitions
        if mesh:
            first, *rest = mesh
            mesh = {first: mesh[first] // slices, **{axis: mesh[axis] for axis in rest}}
    sums = defaultdict(lambda: [0, 0.0])
    for computation in module.computations.values():
        times = module.times.get(computation.name, 0)
        if not times or computation.name in module.fused:
            continue
        in_loop = computation.name in module.in_loop
        for instruction in computation.instructions.values():
            across = instruction.find(r'_xla_megascale_transfer_type="(\w+)"')
            if across and instruction.opcode == "send":
                kind = across.lower().replace("_", "-").replace("one-to-one", KINDS[-1])
                listed = instruction.find(r'_xla_megascale_target="\{([\d,]+)\}x')
                size = len(listed.split(",")) if listed else slices
                where, collective, spans, axes = computation, instruction, size, ()
                asynchronous = True
                payload = computation.instructions[instruction.operands[0]].shapes[0].bytes
            else:
                issued = _issued(module, computation, instruction)
                if issued is None:
                    continue
                kind, collective, where, asynchronous = issued
                groups = _groups(collective, module.partitions)
                size = _ring(groups) if kind == "collective-permute" else len(groups[0])
                if size == 1:
                    continue
                spans = max(len({chip // per_slice for chip in group}) for group in groups)
                axes = _axes(groups, mesh) if mesh else ()
                payload = sum(s.bytes for s in where.shapes(collective))
            if kind == "all-gather":
                payload *= size
            hidden = asynchronous and _overlapped(
                module, computation, instruction, _end(module, computation, instruction)
            )
            total = sums[kind, hidden, in_loop, size, spans, axes]
            total[0] += times
            total[1] += times * payload
    rows = [Collective(*key, *total) for key, total in sums.items()]
    return sorted(rows, key=lambda row: (-row.bytes, row))


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which chips of one group differ."""
    places = np.asarray(np.unravel_index(groups, tuple(mesh.values())))  # [axis, group, member]
    return tuple(name for name, at in zip(mesh, places) if (at != at[:, :1]).any())


# A TPU multiplies bfloat16: so many passes it makes of a float32 product.
_PASSES = {"highest": 6, "high": 3}


def dot_flops(module: Module, *, passes: bool = False) -> float:
    """FLOPs of matrix products a step on one chip, a multiply-add counting as two.

    Dots and convolutions, which is what the TPU compiler makes of dots; products inside of custom calls
    (cuBLAS) are not seen.

    Args:
      module: the compiled step.
      passes: counts float32 products as often as a TPU makes them in bfloat16: 6 times at HIGHEST precision.
    """
    total = 0.0
    for computation in module.computations.values():
        times = module.times.get(computation.name, 0)
        if not times:
            continue
        for instruction in computation.instructions.values():
            if instruction.opcode not in ("dot", "convolution"):
                continue
            left = computation.instructions[instruction.operands[0]].shapes[0]
            if instruction.opcode == "dot":
                axes = instruction.find(r"lhs_contracting_dims=\{([\d,]+)\}")
                depth = math.prod(left.dims[a] for a in _ints(axes)) if axes else 1
                flops = 2 * math.prod(instruction.shapes[0].dims) * depth
            else:
                flops = _convolution_flops(computation, instruction)
            if passes and left.dtype == "f32":
                precision = instruction.find(r"operand_precision=\{(\w+),")
                flops *= _PASSES.get(precision, 1)
            total += times * flops
    return total


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Multiply-adds with real inputs alone: batched dots become dilated windows that are nearly all padding."""
    left, kernel = (computation.instructions[n].shapes[0].dims for n in convolution.operands[:2])
    out = convolution.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", convolution.find(r"window=\{([^}]*)\}") or ""))
    count = out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    spatial = sorted(set(labels[1]) - {"b", "f"})
    for n, label in enumerate(spatial):

        def setting(key, default, n=n):
            return window[key].split("x")[n] if key in window else default

        stride, dilate = int(setting("stride", 1)), int(setting("lhs_dilate", 1))
        reach, low = int(setting("rhs_dilate", 1)), int(setting("pad", "0_0").split("_")[0])
        result = np.arange(out[labels[3].index(label)])[:, None] * stride
        at = result + np.arange(kernel[labels[2].index(label)]) * reach - low
        inside = (at >= 0) & (at <= (left[labels[1].index(label)] - 1) * dilate)
        count *= int((inside & (at % dilate == 0)).sum())
    return 2.0 * count


def bytes_accessed(module: Module) -> float:
    """Traffic with main memory (HBM) a step on one chip, bytes: an estimate.

    Operands and results of every instruction outside of fusions; what a slice or an update in place touches
    instead of the whole buffer; nothing for arrays that the TPU compiler keeps in the core's own memory.
    """
    total = 0.0
    for computation in module.computations.values():
        times = module.times.get(computation.name, 0)
        if not times or computation.name in module.fused:
            continue
        for instruction in computation.instructions.values():
            total += times * _traffic(module, computation, instruction)
    return total


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or instruction.target in _FREE_CALLS:
        return 0.0
    operands = [computation.instructions[n].shapes for n in instruction.operands]
    inputs = [s for shapes in operands for s in shapes]
    if opcode in ("copy-start", "slice-start"):
        # The result lists the operand again; a copy names its destination first, a slice after the operand.
        target = instruction.shapes[0 if opcode == "copy-start" else 1]
        return target.stored_bytes * (target.in_hbm + inputs[0].in_hbm)
    results = instruction.shapes
    if opcode == "async-start":
        inner = module.called(instruction)
        return sum(_traffic(module, inner, i) for i in inner.instructions.values())
    if opcode == "send":
        results = ()
    elif opcode.endswith("-start") and len(results) > len(inputs):
        results = results[len(inputs) :]  # the operands are listed again before the results
    if opcode == "fusion":
        inner = module.called(instruction)
        if inner.root.target in _FREE_CALLS:
            return 0.0
        read = [
            _read(module, inner, inner.parameters[n].name) if n in inner.parameters else 0.0
            for n, shapes in enumerate(operands)
            if shapes[0].in_hbm
        ]
        return sum(read) + _written(module, inner, instruction.shapes)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return sum(s.stored_bytes * (s.in_hbm + i.in_hbm) for s, i in zip(results, inputs))
    if opcode == "dynamic-update-slice":
        update = inputs[1]
        return update.stored_bytes * (update.in_hbm + instruction.shapes[0].in_hbm)
    return sum(s.stored_bytes for s in [*inputs, *results] if s.in_hbm)


def _read(module: Module, computation: Computation, name: str) -> float:
    """Bytes that a fused computation reads of one of its values that lies in memory."""
    whole = computation.instructions[name].shapes[0].stored_bytes
    total = 0.0
    for user in computation.users[name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.shapes[0].stored_bytes
        elif user.opcode == "bitcast":
            total += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.called(user)
            at = user.operands.index(name)
            total += (
                _read(module, inner, inner.parameters[at].name) if at in inner.parameters else 0.0
            )
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "tuple" or _is_continued(computation, user):
            continue  # handed on, or read where the transfer starts
        else:
            return whole
    return min(total, whole)


def _written(module: Module, computation: Computation, shapes: tuple[Shape, ...]) -> float:
    """Bytes that a fused computation writes to memory; `shapes` are those of the fusion's results."""
    root = computation.root
    if root.target == _START:  # its operand is listed again before the result
        return sum(s.stored_bytes for s in shapes[1:] if s.in_hbm)
    results = root.operands if root.opcode == "tuple" else [root.name]
    total = 0.0
    for name, shape in zip(results, shapes):
        instruction = computation.instructions[name]
        while instruction.opcode == "bitcast":
            instruction = computation.instructions[instruction.operands[0]]
        if not shape.in_hbm or instruction.opcode == "parameter":
            continue
        if _is_continued(computation, instruction):
            continue
        if instruction.opcode == "dynamic-update-slice":
            shape = computation.instructions[instruction.operands[1]].shapes[0]
        if instruction.opcode == "fusion":
            total += _written(module, module.called(instruction), (shape,))
        else:
            total += shape.stored_bytes
    return total


def largest_buffers(module: Module, n: int) -> list[Buffer]:
    """The `n` largest results in main memory: arguments, and what instructions outside of fusions make.

    An update in place makes no buffer. Results of equal shape and origin are listed once.
    """
    found = set()
    for computation in module.computations.values():
        if not module.times.get(computation.name) or computation.name in module.fused:
            continue
        for instruction in computation.instructions.values():
            makes = instruction.opcode not in _FREE and not _ASYNC.fullmatch(instruction.opcode)
            if instruction.opcode == "parameter":
                makes = computation.name == module.entry
            if not makes or instruction.opcode == "dynamic-update-slice":
                continue
            shapes = [s for s in instruction.shapes if s.in_hbm]
            if instruction.opcode == "fusion":
                stored = sum(s.stored_bytes for s in shapes)
                if _written(module, module.called(instruction), instruction.shapes) < stored:
                    continue
            for shape in shapes:
                found.add(
                    Buffer(shape.stored_bytes, str(shape), instruction.opcode, instruction.op_name)
                )
    return sorted(found, key=lambda b: (-b.bytes, b))[:n]
