"""Per-channel ranges of a LayerNormalization output, moved into its affine and the Linear layers that read it.

    a = LN(u; g, b), a W + c  ->  a' = LN(u; g / r1, (b + s r2) / r1), a' (diag(r1) W) + (c - (s r2) W)

with per-channel scales s and zero points z from calibration, one target pair (S, Z), r1 = (s / S)^strength and
r2 = z - Z an integer vector (RepQ-ViT, arXiv 2212.08254). Then a' = (a + s r2) / r1 has nearly the same centred range in
every channel, so one scale per tensor serves. strength 1 is RepQ-ViT; below 1 less of the spread goes into the weight,
as in SmoothQuant (arXiv 2211.10438).

Precondition: every reader of the output is a Linear, and one of them is to be quantized; any other would see a' for a. What
only moves tokens, such as the partition into windows, may lie between: it does the same to a' as to a.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from vitq_compiler.blocks.linear import Linear, absorb, sole_readers
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.graph import Graph, Node, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, equalizing_scale

CODES = 255
MIDDLE = 128  # the target zero point Z: ranges end up centred


@dataclass(frozen=True)
class ReparameterizeLayernorm(Pass):
    """LN(u) W -> LN'(u) W', channel ranges of LN(u) equalized"""

    name = "reparameterize-layernorm"
    requires = frozenset({Fact.CALIBRATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True
    strength: float = 0.5

    def __post_init__(self) -> None:
        equalizing_scale(np.ones(1), self.strength)  # refuses a strength outside 0 to 1

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in c.graph.find("LayerNormalization"):
            try:
                linears = self._readers(c, node)
            except MatchFailure as failure:
                self.note(c, node.name, f"LayerNormalization keeps its ranges: {failure.reason}")
                continue
            inputs = {linear.input.name for linear in linears} & c.table.statistics.keys()
            shift, scale = self.factors(reduce(ChannelStatistics.merge, [c.table.statistics[name] for name in inputs]))
            fold(c.graph, node, linears, shift, scale)
            for name in inputs:
                c.table.rescale(name, scale, shift)
            changes += 1
        return changes

    def factors(self, seen: ChannelStatistics) -> tuple[np.ndarray, np.ndarray]:
        """(s r2, r1), float32 of shape [channels] each, for the observed channel ranges."""
        width, scale = equalizing_scale(seen.high - seen.low, self.strength)
        step = width / CODES
        zero_point = np.rint(-seen.low / step)
        shift = step * (zero_point - MIDDLE)
        return shift.astype(np.float32), scale

    def _readers(self, c: Compilation, node: Node) -> list[Linear]:
        linears = sole_readers(node.outputs[0], c.annotations.by_matmul, c.graph)
        if not any(Edge(linear.name, 0) in c.specs for linear in linears):
            raise MatchFailure("no Linear that is to be quantized reads it")
        if node.attrs.get("axis", -1) not in (-1, len(node.outputs[0].shape) - 1):
            raise MatchFailure("it normalizes more than the last axis")
        return linears


def fold(graph: Graph, node: Node, linears: list[Linear], shift: np.ndarray, scale: np.ndarray) -> None:
    """Replace the output a of a LayerNormalization by (a + shift) / scale and make its readers undo it."""
    gamma = value(node.inputs[1])
    beta = value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(gamma)
    node.inputs[1].values = (gamma / scale).astype(np.float32)
    if len(node.inputs) < 3:
        node.inputs.append(graph.constant(f"{node.name}/beta", beta))
    node.inputs[2].values = ((beta + shift) / scale).astype(np.float32)
    for linear in linears:
        absorb(graph, linear, shift, scale)
