"""Normalizations in their decomposed forms, as patterns: what LayerNormalization and RMSNormalization have in common.

mean(t)          ReduceMean, or ReduceSum divided by the number of channels
t / sqrt(v)      Div by Sqrt or Pow 0.5, or Mul by Reciprocal, by 1 / Sqrt, or by Pow -0.5
"""

from __future__ import annotations

import numpy as np

from vitq_compiler.graph import Node, Tensor, is_constant, scalar, value
from vitq_compiler.pattern import Bindings, MatchFailure, Pattern, const, either, op

NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


def mean(of: Pattern, name: str) -> Pattern:
    """The mean of ``of``; its reducing node is bound to ``name``, the divisor of a sum to ``name/divisor`` or ``name/factor``."""
    total = op.ReduceSum(of).named(name)
    return either(
        op.ReduceMean(of).named(name),
        op.Div(total, const(f"{name}/divisor")),
        op.Mul(total, const(f"{name}/factor")),
    )


def square(of: Pattern) -> Pattern:
    """``of`` times itself."""
    return either(op.Pow(of, const(equals=2.0)), op.Mul(of, of))


def inverse_root(variance: Pattern) -> Pattern:
    """1 / sqrt(variance), as a factor."""
    root = either(op.Sqrt(variance), op.Pow(variance, const(equals=0.5)))
    return either(op.Reciprocal(root), op.Div(const(equals=1.0), root), op.Pow(variance, const(equals=-0.5)))


def over_root(of: Pattern, variance: Pattern, gamma: Pattern | None = None) -> Pattern:
    """``of`` / sqrt(variance), times ``gamma`` where it is given; the product may be grouped either way."""
    root = either(op.Sqrt(variance), op.Pow(variance, const(equals=0.5)))
    factor = inverse_root(variance)
    plain = either(op.Div(of, root), op.Mul(of, factor))
    return plain if gamma is None else either(op.Mul(plain, gamma), op.Mul(of, op.Mul(factor, gamma)), op.Mul(op.Mul(of, gamma), factor))


def width_of(bound: Bindings, means: tuple[str, ...]) -> int:
    """The number of channels, which every mean in ``means`` is taken over.

    Raises:
        MatchFailure: a mean is over other axes, or a parameter is not one number per channel.
    """
    x: Tensor = bound["x"]
    width = x.shape[-1] if x.shape else None
    if not isinstance(width, int) or width < 1:
        sizes = [value(bound[n]).shape[-1] for n in ("gamma", "beta") if n in bound and value(bound[n]).ndim]
        if not sizes:
            raise MatchFailure(f"the number of channels of {x.name} is unknown", x.name)
        width = int(sizes[0])
    for name in means:
        _check_mean(bound, name, width, len(x.shape) if x.shape else None)
    for name in ("gamma", "beta"):
        if name in bound and (value(bound[name]).size != width or value(bound[name]).shape[-1:] != (width,)):
            raise MatchFailure(f"{name} has shape {list(value(bound[name]).shape)}, not one number for each of {width} channels", x.name)
    if scalar(bound["epsilon"]) is None:
        raise MatchFailure("epsilon is not one number", x.name)
    return width


def _check_mean(bound: Bindings, name: str, width: int, rank: int | None) -> None:
    node: Node = bound[name]
    last = [[-1]] if rank is None else [[-1], [rank - 1]]
    if _axes(node) not in last or not node.attrs.get("keepdims", 1):
        raise MatchFailure(f"a mean is over axes {_axes(node) or 'that are computed, or all'}, not over the last one and kept", node.name)
    divisor = scalar(bound[f"{name}/divisor"]) if f"{name}/divisor" in bound else None
    factor = scalar(bound[f"{name}/factor"]) if f"{name}/factor" in bound else None
    count = divisor if divisor is not None else 1 / factor if factor else None
    if node.op == "ReduceSum" and (count is None or not np.isclose(count, width)):
        raise MatchFailure(f"a sum over {width} channels is divided by {count if count is None else round(count, 3)}", node.name)


def _axes(node: Node) -> list[int]:
    if len(node.inputs) > 1:
        return [int(a) for a in value(node.inputs[1]).reshape(-1)] if is_constant(node.inputs[1]) else []
    return [int(a) for a in node.attrs.get("axes", [])]


def parameter(bound: Bindings, name: str, width: int, default: float) -> np.ndarray:
    """``gamma`` or ``beta`` as one float32 per channel, ``default`` where there is none."""
    return value(bound[name]).reshape(-1).astype(np.float32) if name in bound else np.full(width, default, np.float32)
