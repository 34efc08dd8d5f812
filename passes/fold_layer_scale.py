"""LayerScale into the Linear before it.

    (x W + c) * g  ->  x (W diag(g)) + c * g

Precondition: nothing but the multiplication reads the Linear's output.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.linear import Linear, find_linears
from vitq_compiler.graph import Graph, is_constant, readers, value
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class FoldLayerScale(Pass):
    """(x W + c) * g -> x (W diag(g)) + c * g"""

    name = "fold-layer-scale"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for linear in find_linears(c.graph):
            while _fold(c.graph, linear):
                changes += 1
        c.graph.clean()
        return changes


def _fold(graph: Graph, linear: Linear) -> bool:
    following = readers(linear.output)
    if len(following) != 1 or following[0].op != "Mul" or graph.is_output(linear.output):
        return False
    mul = following[0]
    scale = next((t for t in mul.inputs if is_constant(t)), None)
    if scale is None or value(scale).size != linear.out_features or value(scale).shape[-1:] != (linear.out_features,):
        return False
    if value(scale).ndim > max(1, len(linear.output.shape or ())):
        return False  # the product has more axes
    factor = value(scale).reshape(-1)
    linear.weight.values = value(linear.weight) * factor
    if linear.bias is not None:
        linear.bias.values = value(linear.bias) * factor
    graph.replace(mul.outputs[0], linear.output)
    graph.remove(mul)
    return True
