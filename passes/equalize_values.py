"""Channel ranges of the proj input, moved into the value Linear and proj.

    o = P v,  o W + c  ->  o' = P (v diag(1/r)),  o' (diag(r) W) + c,   r = (range / mean range)^strength

Every channel of o is a mean of the same channel of v, so a positive scale per channel of v passes through (the v/proj
half of the scale moves of SmoothQuant, arXiv 2211.10438; also AdaLog's and APHQ-ViT's per-head scales made static).

Precondition: v is read by this attention alone, as values alone, and o by proj alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, feeds_only
from vitq_compiler.graph import Graph, producer, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, equalizing_scale


@dataclass(frozen=True)
class EqualizeValues(Pass):
    """P v W -> P (v diag(1/r)) (diag(r) W)"""

    name = "equalize-values"
    requires = frozenset({Fact.CALIBRATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True
    strength: float = 0.5

    def __post_init__(self) -> None:
        equalizing_scale(np.ones(1), self.strength)  # refuses a strength outside 0 to 1

    def run(self, c: Compilation) -> int:
        changes = 0
        for attention in c.annotations.attentions:
            if Edge(attention.proj.name, 0) not in c.specs:
                self.note(c, attention.proj.block, "values keep their ranges: proj stays in float")
            elif shared := _shared(c.graph, attention):
                self.note(c, attention.proj.block, f"values keep their ranges: {shared}")
            elif not feeds_only(c.graph, attention.v.linear.output, attention):
                self.note(
                    c, attention.proj.block, f"values keep their ranges: {attention.v.linear.name} is read by more than this attention"
                )
            else:
                self._equalize(c, attention)
                changes += 1
        return changes

    def _equalize(self, c: Compilation, attention: Attention) -> None:
        seen = c.table.statistics[attention.proj.input.name]
        _, ratio = equalizing_scale(np.maximum(np.abs(seen.low), np.abs(seen.high)), self.strength)
        linear, columns = attention.v.linear, attention.v.columns
        divisor = np.ones(linear.out_features, np.float32)
        divisor[columns] = ratio
        linear.weight.values = value(linear.weight) / divisor
        if linear.bias is not None:
            linear.bias.values = value(linear.bias) / divisor
        attention.proj.weight.values = value(attention.proj.weight) * ratio[:, None]
        c.table.rescale(attention.proj.input.name, ratio, np.zeros_like(ratio))


def _shared(graph: Graph, attention: Attention) -> str:
    """What else depends on the scale of the values, or an empty string."""
    v = attention.v
    for view in (attention.q, attention.k):
        if view.linear.matmul is v.linear.matmul and np.intersect1d(view.columns, v.columns).size:
            return "queries or keys are made of the same features"
    tensor = attention.proj.input
    while (node := producer(tensor)) is not None:
        if graph.is_output(tensor):
            return f"{tensor.name} is a graph output"
        if node is attention.context or node is attention.fused:
            break
        tensor = node.inputs[0]
    return ""
