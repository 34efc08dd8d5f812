"""LayerNormalization from its decomposed chain.

    d = x - mean(x);  d / sqrt(mean(d^2) + eps) * gamma + beta  ->  LayerNormalization(x, gamma, beta; eps)

Matched: Pow or a product for the square, Sqrt or Pow 0.5, Div or Reciprocal, constants on either side of Mul and Add.
Precondition: means over the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, scalar, value
from vitq_compiler.pattern import Bindings, const, either, match, op, var
from vitq_compiler.pipeline import Compilation, Fact, Pass

_centered = op.Sub(var("x"), op.ReduceMean(var("x")).named("mean"))
_square = either(op.Pow(_centered, const(equals=2.0)), op.Mul(_centered, _centered))
_variance = op.Add(op.ReduceMean(_square).named("mean_square"), const("epsilon"))
_deviation = either(op.Sqrt(_variance), op.Pow(_variance, const(equals=0.5)))
_normalized = either(op.Div(_centered, _deviation), op.Mul(_centered, op.Reciprocal(_deviation)))
LAYERNORM = op.Add(op.Mul(_normalized, const("gamma")), const("beta"))


@dataclass(frozen=True)
class RecoverLayernorm(Pass):
    """(x - mean) / sqrt(var + eps) * gamma + beta -> LayerNormalization"""

    name = "recover-layernorm"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in c.graph.find("Add"):
            bound = match(LAYERNORM, node.outputs[0]) if node.outputs else None
            if bound is not None and _over_last_axis(bound):
                _rewrite(c.graph, node, bound)
                changes += 1
        c.graph.clean()
        return changes


def _over_last_axis(bound: Bindings) -> bool:
    width = value(bound["gamma"]).size
    x: Tensor = bound["x"]
    last = len(x.shape) - 1 if x.shape else -1
    return (
        all(_axes(bound[name]) in ([-1], [last]) and bound[name].attrs.get("keepdims", 1) for name in ("mean", "mean_square"))
        and (x.shape is None or not isinstance(x.shape[-1], int) or x.shape[-1] == width)
        and value(bound["beta"]).size == width
        and value(bound["gamma"]).shape[-1:] == (width,)
        and scalar(bound["epsilon"]) is not None
    )


def _axes(mean: Node) -> list[int]:
    if len(mean.inputs) > 1:
        return [int(a) for a in value(mean.inputs[1]).reshape(-1)] if is_constant(mean.inputs[1]) else []
    return [int(a) for a in mean.attrs.get("axes", [])]


def _rewrite(graph: Graph, node: Node, bound: Bindings) -> None:
    gamma, beta = (graph.constant(f"{node.name}/{n}", value(bound[n]).reshape(-1).astype(np.float32)) for n in ("gamma", "beta"))
    epsilon = scalar(bound["epsilon"])
    output = graph.insert(
        "LayerNormalization", [bound["x"], gamma, beta], name=f"{node.name}/layernorm", like=node.outputs[0], axis=-1, epsilon=epsilon
    )
    graph.replace(node.outputs[0], output)
