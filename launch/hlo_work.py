"""The work of one chip in a step of a compiled program: matrix FLOPs and memory traffic."""

import json
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from grain_jax.launch import hlo
from grain_jax.launch.hlo import Computation, Instruction, Module, Shape

# A TPU multiplies bfloat16. Passes that it needs for a float32 product:
_PASSES = {"highest": 6, "high": 3}
# Time of a float32 product on a GPU, in bfloat16 products. TF32 takes twice the time. HIGHEST precision uses
# the FP32 units, which are 16 times slower on an A100 and 15 times on an H100 (data sheets of NVIDIA).
_GPU_PASSES = {"HIGHEST": 16, "HIGH": 2, "DEFAULT": 2}
_SLICES = ("dynamic-slice", "slice", "gather")


class Work(NamedTuple):
    """The work of one chip: FLOPs of matrix products (float32 by passes), and traffic with main memory."""

    flops: float
    bytes: float


def dot_flops(module: Module, *, passes: bool = False) -> float:
    """FLOPs of matrix products a step on one chip, a multiply-add counting as two.

    Dots, convolutions, which is what the TPU compiler makes of dots, and Pallas kernels, as they estimate
    their own; products by cuBLAS and attention by cuDNN.

    Args:
      module: the compiled step.
      passes: counts float32 products as often as a TPU makes them in bfloat16: 6 times at HIGHEST precision.
        On a GPU it counts the bfloat16 products that take their time. `Module.kernels` counts Pallas kernels.
    """
    return sum((n * _flops(module, c, i, passes) for c, i, n in module.running()), 0.0)


def bytes_accessed(module: Module) -> float:
    """Traffic with main memory (HBM) a step on one chip, bytes: an estimate.

    It counts operands and results of every instruction outside of fusions. A slice or an update in place
    counts what it touches. Arrays that the TPU compiler keeps in the core's own memory count nothing.
    """
    outside = ((c, i, n) for c, i, n in module.running() if c.name not in module.fused)
    return sum((n * _traffic(module, c, i) for c, i, n in outside), 0.0)


def arrays(module: Module) -> list[tuple[int, str, str]]:
    """(bytes, shape, operation) of the arrays in main memory that instructions make, each once."""
    made = []
    for computation, instruction, _ in module.running():
        names = instruction.opcode in hlo.FREE or instruction.target in hlo.FREE_CALLS
        if names or instruction.opcode == "dynamic-update-slice" or computation.name in module.fused:
            continue
        where = (instruction.find(r'op_name="([^"]*)"') or instruction.name).replace("\\", "")
        results = instruction.shapes[-1:] if instruction.opcode.endswith("-start") else instruction.shapes
        made += [(round(s.stored_bytes), str(s), where) for s in results if s.in_hbm]
    return made


def work_of(module: Module, computation: Computation, instructions: Iterable[Instruction]) -> Work:
    """The work of one run of these instructions of a computation, with all that they call."""
    flops = traffic = 0.0
    for instruction in instructions:
        flops += _flops(module, computation, instruction, True)
        if computation.name not in module.fused:
            traffic += _traffic(module, computation, instruction)
        for inner, times in module.callees(instruction):
            work = work_of(module, inner, inner.instructions.values())
            flops += times * work.flops
            traffic += times * work.bytes
    return Work(flops, traffic)


def _flops(module: Module, computation: Computation, instruction: Instruction, passes: bool) -> float:
    """The FLOPs of the instruction itself, without the computations that it calls."""
    target = instruction.target
    if target == "tpu_custom_call":
        if passes and instruction.name in module.kernels:
            return module.kernels[instruction.name]
        return float(instruction.find(r'"cost_estimate":\{"flops":"(\d+)"') or 0)
    if target.startswith("__cudnn$fmha"):
        return _attention_flops(computation, instruction)
    if instruction.opcode in ("dot", "convolution"):
        left = computation.instructions[instruction.operands[0]].shapes[0]
        axes = instruction.find(r"lhs_contracting_dims=\{([\d,]+)\}")
        axes = axes.split(",") if axes else []
        factor = _PASSES.get(instruction.find(r"operand_precision=\{(\w+),"), 1)
    elif target.startswith("__cublas$"):
        config = _backend_config(instruction)["gemm_backend_config"]
        left = computation.instructions[instruction.operands[0]].shapes[0]
        axes = config["dot_dimension_numbers"].get("lhs_contracting_dimensions", [])
        precision = config.get("precision_config", {}).get("operand_precision", ["DEFAULT"])
        factor = _GPU_PASSES[precision[0]]
    else:
        return 0.0
    if instruction.opcode == "convolution":
        flops = _convolution_flops(computation, instruction)
    else:
        depth = math.prod(left.dims[int(axis)] for axis in axes)
        flops = 2.0 * math.prod(instruction.shapes[0].dims) * depth
    return flops * (factor if passes and left.dtype == "f32" else 1)


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Multiply-adds with real inputs: batched dots become dilated windows that are nearly all padding."""
    left, kernel = (computation.instructions[n].shapes[0].dims for n in convolution.operands[:2])
    out = convolution.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", convolution.find(r"window=\{([^}]*)\}") or ""))
    count = out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    spatial = sorted(set(labels[1]) - {"b", "f"})
    for n, label in enumerate(spatial):

        def setting(key, default, n=n):
            return int(window[key].split("x")[n].split("_")[0]) if key in window else default

        dilate = setting("lhs_dilate", 1)
        result = np.arange(out[labels[3].index(label)])[:, None] * setting("stride", 1)
        steps = np.arange(kernel[labels[2].index(label)]) * setting("rhs_dilate", 1)
        positions = result + steps - setting("pad", 0)
        inside = (positions >= 0) & (positions <= (left[labels[1].index(label)] - 1) * dilate)
        count *= int((inside & (positions % dilate == 0)).sum())
    return 2.0 * count


def _attention_flops(computation, instruction) -> float:
    """By cuDNN. Forward two products of length x length x width a head; backward five, with the scores."""
    config = _backend_config(instruction)["cudnn_fmha_backend_config"]
    scores = math.prod(int(n) for n in config["intermediate_tensor_shape"]["dimensions"])
    # The query, [B, L, heads, width] in whatever layout: its last axis is the width.
    width = computation.instructions[instruction.operands[0]].shapes[0].dims[-1]
    return 2.0 * scores * width * (5 if instruction.target.endswith("Backward") else 2)


def _backend_config(instruction: Instruction) -> dict:
    text = instruction.rest.partition("backend_config=")[2]
    return json.JSONDecoder().raw_decode(text)[0]


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    opcode, results = instruction.opcode, instruction.shapes
    if opcode in hlo.FREE or instruction.target in hlo.FREE_CALLS:
        return 0.0
    names = instruction.operands
    # A kernel that is given an array twice reads a part of it each time.
    if instruction.target == "tpu_custom_call":
        names = tuple(dict.fromkeys(names))
    operands = [computation.instructions[n].shapes for n in names]
    inputs = [s for shapes in operands for s in shapes]
    if opcode in ("copy-start", "slice-start"):
        # The result lists the operand again; a copy names its destination first, a slice after the operand.
        target = results[0 if opcode == "copy-start" else 1]
        return target.stored_bytes * (target.in_hbm + inputs[0].in_hbm)
    if instruction.target.startswith(("__cublas$", "__cudnn$")):
        # A library call need not touch its scratch memory.
        results = tuple(s for s in results if s.dtype not in ("s8", "u8"))
    if opcode == "async-start":
        inner = module.called(instruction)
        return sum(_traffic(module, inner, i) for i in inner.instructions.values())
    if opcode == "send":
        results = ()
    elif opcode.endswith("-start") and len(results) > len(inputs):
        results = results[len(inputs) :]  # the operands are listed again before the results
    if opcode == "fusion":
        inner = module.called(instruction)
        if inner.root.target in hlo.FREE_CALLS:
            return 0.0
        in_hbm = [n for n, shapes in enumerate(operands) if shapes[0].in_hbm]
        read = [_read(module, inner, inner.parameters[n]) for n in in_hbm]
        return sum(read) + _written(module, inner, instruction.shapes)
    if opcode in _SLICES:
        return sum(s.stored_bytes * (s.in_hbm + i.in_hbm) for s, i in zip(results, inputs))
    if opcode == "dynamic-update-slice":
        update = inputs[1]
        return update.stored_bytes * (update.in_hbm + results[0].in_hbm)
    return sum(s.stored_bytes for s in [*inputs, *results] if s.in_hbm)


def _read(module: Module, computation: Computation, value: Instruction) -> float:
    """Bytes that a fused computation reads of a value in memory, such as one of its parameters."""
    name, whole = value.name, value.shapes[0].stored_bytes
    total = 0.0
    for user in computation.users[name]:
        if user.opcode in _SLICES and user.operands[0] == name:
            total += user.shapes[0].stored_bytes
        elif user.opcode == "bitcast":
            total += _read(module, computation, user)
        elif user.opcode == "fusion":
            inner = module.called(user)
            total += _read(module, inner, inner.parameters[user.operands.index(name)])
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "tuple" or hlo.is_continued(computation, user):
            continue  # handed on, or read where the transfer starts
        else:
            return whole
    return min(total, whole)


def _written(module: Module, computation: Computation, shapes: tuple[Shape, ...]) -> float:
    """Bytes that a fused computation writes to memory; `shapes` belong to the fusion's results."""
    root = computation.root
    if root.target == hlo.START:  # its operand is listed again before the result
        return sum(s.stored_bytes for s in shapes[1:] if s.in_hbm)
    results = root.operands if root.opcode == "tuple" else [root.name]
    total = 0.0
    for name, shape in zip(results, shapes):
        instruction = computation.instructions[name]
        while instruction.opcode == "bitcast":
            instruction = computation.instructions[instruction.operands[0]]
        if not shape.in_hbm or instruction.opcode == "parameter":
            continue
        if hlo.is_continued(computation, instruction):
            continue
        if instruction.opcode == "dynamic-update-slice":
            shape = computation.instructions[instruction.operands[1]].shapes[0]
        if instruction.opcode == "fusion":
            total += _written(module, module.called(instruction), (shape,))
        else:
            total += shape.stored_bytes
    return total
