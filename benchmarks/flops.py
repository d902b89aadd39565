"""Floating-point operations of a JAX function, counted in its jaxpr: matrix products alone, loops unrolled.

A multiply-add counts as two. Element-wise work is left out, as in the usual 6ND count, so the number does not
depend on the backend.
"""

import math
from typing import Any

import jax


def matmul_flops(function, *arguments: Any) -> int:
    """Of one call; `arguments` are arrays or `jax.ShapeDtypeStruct`s."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
            continue
        if name == "while":
            if any(_count(part) for part in _jaxprs(params)):
                raise NotImplementedError("matrix products in a loop whose trips are not known")
            continue
        if name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
            continue
        inner = sum(_count(part) for part in _jaxprs(params))
        total += inner * (params["length"] if name == "scan" else 1)
    return total


def _jaxprs(params: dict[str, Any]):
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if hasattr(part, "jaxpr"):  # closed
                part = part.jaxpr
            if hasattr(part, "eqns"):
                yield part
