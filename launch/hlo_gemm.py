"""FLOPs of the library calls in programs for GPUs: products by cuBLAS, attention by cuDNN."""

import json
import math

from grain_jax.launch import hlo

# A product of float32 as so many of bfloat16: by TF32 it takes twice the time; at HIGHEST precision the FP32 units
# make it, which are 16 times slower on an A100 and 15 on an H100 (data sheets of NVIDIA).
_FLOAT32 = {"HIGHEST": 16, "HIGH": 2, "DEFAULT": 2}


def flops(
    computation: hlo.Computation, instruction: hlo.Instruction, *, passes: bool = False
) -> float:
    """FLOPs of one run of a custom call, a multiply-add counting as two; 0 for other instructions.

    Args:
      computation: that it stands in.
      instruction: of the compiled program.
      passes: counts a float32 product as so many of bfloat16 as take its time.
    """
    target = instruction.target
    if target.startswith("__cublas$"):
        return _cublas(computation, instruction, passes)
    if target.startswith("__cudnn$fmha"):
        return _attention(computation, instruction)
    return 0.0


def _cublas(computation, instruction, passes) -> float:
    config = _backend_config(instruction)["gemm_backend_config"]
    left = computation.instructions[instruction.operands[0]].shapes[0]
    axes = config["dot_dimension_numbers"].get("lhs_contracting_dimensions", [])
    depth = math.prod(left.dims[int(axis)] for axis in axes)
    total = 2.0 * math.prod(instruction.shapes[0].dims) * depth
    if passes and left.dtype == "f32":
        total *= _FLOAT32[
            config.get("precision_config", {}).get("operand_precision", ["DEFAULT"])[0]
        ]
    return total


def _attention(computation, instruction) -> float:
    """Forward two products of length x length x width a head; backward five, the scores made again."""
    config = _backend_config(instruction)["cudnn_fmha_backend_config"]
    scores = math.prod(int(n) for n in config["intermediate_tensor_shape"]["dimensions"])
    # The query, [B, L, heads, width] in whatever layout: its last axis is the width.
    width = computation.instructions[instruction.operands[0]].shapes[0].dims[-1]
    return 2.0 * scores * width * (5 if instruction.target.endswith("Backward") else 2)


def _backend_config(instruction: hlo.Instruction) -> dict:
    text = instruction.rest.partition("backend_config=")[2]
    return json.JSONDecoder().raw_decode(text)[0]


def results(instruction: hlo.Instruction) -> tuple[hlo.Shape, ...]:
    """The results of a library call without its scratch memory, which it need not touch."""
    if instruction.target.startswith(("__cublas$", "__cudnn$")):
        return tuple(s for s in instruction.shapes if s.dtype not in ("s8", "u8"))
    return instruction.shapes
