"""The collectives of a compiled step, summed: kind, payload, mesh axes, whether they are hidden."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from grain_jax.launch import hlo, hlo_work
from grain_jax.launch.hlo import Computation, Instruction, Module

_SMALL = 1024  # bytes: an instruction on less than this hides nothing


class Collective(NamedTuple):
    """Collectives of one sort, summed over a step."""

    kind: str  # one of hlo.KINDS
    overlapped: bool  # whether the schedule runs other work between its start and its end
    in_loop: bool  # whether a loop repeats it
    group_size: int  # chips that take part together (of a permutation: length of the ring)
    slices: int  # that a group spans; above 1 it goes over the data-centre network
    axes: tuple[str, ...]  # mesh axes that it runs along, if the mesh is known
    count: int  # runs a step
    # Payload of one chip, all runs together: the array that all chips of a group hold together at its largest
    # (all-reduce, reduce-scatter, all-to-all, permutation: the operand; all-gather: the result).
    bytes: float
    ways: int = 1  # permutations of one loop, which go over different links or the two directions of one
    # What the schedule runs between their starts and ends; transfers that overlap share it.
    work: hlo_work.Work = hlo_work.Work(math.inf, math.inf)


def _groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """The chips of each group, as positions in the mesh; for a permutation its (source, target) pairs."""
    rest = instruction.rest
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", rest)
    if pairs:
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,\s]+)\}", pairs[1])]
    if "replica_groups={}" in rest or "replica_groups=" not in rest:
        return [list(range(partitions))]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _iota(iota[2]).reshape(_ints(iota[1])).tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{(['\w,]*)\}", rest)
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
    targets, chip, seen = dict(pairs), pairs[0][0], set()
    while chip is not None and chip not in seen:
        seen.add(chip)
        chip = targets.get(chip)
    return len(seen)


def _is_work(module: Module, computation: Computation, instruction: Instruction) -> bool:
    """Whether it keeps the chip busy enough to hide a transfer."""
    opcode = instruction.opcode
    if opcode in hlo.FREE - {"while", "call", "conditional"} or opcode.endswith("-start"):
        return False
    if hlo.ASYNC.fullmatch(opcode) or instruction.target in hlo.FREE_CALLS:
        return False
    inner = module.called(instruction)
    if inner and inner.root.target in (hlo.START, hlo.DONE):
        return False
    inputs = [s for name in instruction.operands for s in computation.instructions[name].shapes]
    return max((s.bytes for s in (*instruction.shapes, *inputs)), default=0) > _SMALL


def _between(module, computation, start: Instruction) -> list[Instruction]:
    """The work that is scheduled between `start` and the instruction that waits for it."""
    done = _end(module, computation, start)
    if done is None:
        return []
    order = list(computation.instructions.values())
    between = order[order.index(start) + 1 : order.index(done)]
    return [i for i in between if _is_work(module, computation, i)]


def _end(module: Module, computation: Computation, start) -> Instruction | None:
    """The instruction that waits for `start`."""
    if start.opcode == "fusion":  # TPU: start, compute and wait are fusions that share a channel
        channel = _channel(module, start)
        fusions = (i for i in computation.instructions.values() if i.opcode == "fusion")
        done = (i for i in fusions if module.called(i).root.target == hlo.DONE)
        return next((i for i in done if _channel(module, i) == channel), None)
    if start.opcode == "send":
        key = r'_xla_host_transfer_rendezvous="([^"]*)"'
        received = (i for i in computation.instructions.values() if i.opcode == "recv")
        same = (i for i in received if i.find(key) == start.find(key))
        return next((u for i in same for u in computation.users[i.name][:1]), None)
    for user in computation.users[start.name]:
        if user.opcode == "async-update":
            return _end(module, computation, user)
        if user.opcode.endswith("-done"):
            return user
    return None


def _channel(module: Module, fusion: Instruction) -> str | None:
    inner = module.called(fusion).instructions.values()
    return next((i.find(r"channel_id=(\d+)") for i in inner if i.opcode in hlo.KINDS), None)


def _issued(module: Module, computation: Computation, instruction: Instruction):
    """(kind, the collective, its computation, whether it is asynchronous) that is issued here, or None."""
    opcode = instruction.opcode
    if opcode.removesuffix("-start") in hlo.KINDS:
        return opcode.removesuffix("-start"), instruction, computation, opcode.endswith("-start")
    if opcode not in ("fusion", "async-start"):
        return None
    inner = module.called(instruction)
    opcodes = [i.opcode for i in inner.instructions.values()]
    collective = next((i for i in inner.instructions.values() if i.opcode in hlo.KINDS), None)
    if collective is None or hlo.is_continued(inner, collective):
        return None
    kind = collective.opcode
    if kind == "all-reduce" and "dynamic-slice" in opcodes:
        kind = "reduce-scatter"  # the TPU compiler's own fusion of the two
    return kind, collective, inner, opcode == "async-start" or inner.root.target == hlo.START


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
    sums: dict[Collective, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for computation in module.computations.values():
        times = module.times.get(computation.name, 0)
        if not times or computation.name in module.fused:
            continue
        instructions = computation.instructions.values()
        issued = (_transfer(module, computation, i, slices, per_slice, mesh) for i in instructions)
        transfers = [transfer for transfer in issued if transfer]
        for (sort, payload, _), work in zip(transfers, _shares(module, computation, transfers)):
            sums[sort] += times * np.array([1.0, payload, *work])
    rows = [
        sort._replace(count=int(count), bytes=payload, work=hlo_work.Work(*work))
        for sort, (count, payload, *work) in ((sort, x.tolist()) for sort, x in sums.items())
    ]
    return sorted(rows, key=lambda row: (-row.bytes, row))


# A transfer: its sort (a Collective without sums), bytes of one chip, and what is scheduled beside it.
_Transfer = tuple[Collective, float, list[Instruction]]


def _transfer(module, computation, instruction, slices, per_slice, mesh) -> _Transfer | None:
    """The transfer that an instruction issues: a collective of several chips, or a `send` to other slices."""
    in_loop, ways, axes = computation.name in module.in_loop, 1, ()
    across = instruction.find(r'_xla_megascale_transfer_type="(\w+)"')
    if across and instruction.opcode == "send":
        kind = across.lower().replace("_", "-").replace("one-to-one", "collective-permute")
        listed = instruction.find(r'_xla_megascale_target="\{([\d,]+)\}x')
        size = spans = len(listed.split(",")) if listed else slices
        payload, asynchronous = computation.instructions[instruction.operands[0]].shapes[0].bytes, True
    else:
        issued = _issued(module, computation, instruction)
        if issued is None:
            return None
        kind, collective, where, asynchronous = issued
        groups = _groups(collective, module.partitions)
        size = len(groups[0])
        if kind == "collective-permute":
            size, ways = _ring(groups), _ways(module, computation) if in_loop else 1
        if size == 1:
            return None
        spans = max(len({chip // per_slice for chip in group}) for group in groups)
        payload = sum(s.bytes for name in collective.operands for s in where.instructions[name].shapes)
        mesh = mesh or {}
        positions = np.unravel_index(groups, tuple(mesh.values())) if mesh else ()  # [axis][group, member]
        axes = tuple(name for name, index in zip(mesh, positions) if (index != index[:, :1]).any())
    between = _between(module, computation, instruction) if asynchronous else []
    sort = Collective(kind, bool(between), in_loop, size, spans, axes, 0, 0.0, ways)
    return sort, payload * (size if kind == "all-gather" else 1), between


def _shares(module, computation, transfers) -> list[hlo_work.Work]:
    """The work beside each transfer; transfers share work in proportion to their payloads."""
    under_way = Counter()
    for _, payload, between in transfers:
        under_way.update({i.name: payload for i in between})
    instructions = computation.instructions
    work = {n: hlo_work.work_of(module, computation, [instructions[n]]) for n in under_way}
    shares = []
    for _, payload, between in transfers:
        parts = [(work[i.name], payload / max(under_way[i.name], 1)) for i in between]
        shares.append(hlo_work.Work(*(sum(part * w[n] for w, part in parts) for n in range(2))))
    return shares


def _ways(module: Module, computation: Computation) -> int:
    """How many permutations a computation has, if no two share a pair of chips; else 1."""
    permutations = {
        frozenset(map(tuple, _groups(instruction, module.partitions)))
        for instruction in computation.instructions.values()
        if instruction.opcode in ("collective-permute", "collective-permute-start")
    }
    pairs = sum(len(permutation) for permutation in permutations)
    disjoint = len(frozenset().union(*permutations)) == pairs
    return max(len(permutations), 1) if disjoint else 1
