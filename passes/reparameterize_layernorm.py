"""Per-channel ranges of a LayerNormalization output, moved into its affine and the Linear layers that read it.

    a = LN(u; g, b), a W + c  ->  a' = LN(u; g / r1, (b + s r2) / r1), a' (diag(r1) W) + (c - (s r2) W)

with per-channel scales s and zero points z from calibration, one target pair (S, Z), r1 = (s / S)^strength and
r2 = z - Z an integer vector (RepQ-ViT, arXiv 2212.08254). Then a' = (a + s r2) / r1 has nearly the same centred range in
every channel, so one scale per tensor serves.

S       ``common=mean`` of s (RepQ-ViT), or ``median`` (DopQ-ViT, arXiv 2408.03291)
Z       the middle code of the readers' quantizers: a symmetric one, which has no zero point, then loses nothing
r1      ``strength`` 1 is RepQ-ViT; below 1 less of the spread goes into the weight (SmoothQuant, arXiv 2211.10438); with ``limit``
        its largest element is at most so many times the smallest
        (with ``spread`` all stays where the widest channel is less than so many times the median one, as after rotate-residual:
        what is even already is only made worse at 8 bits)
r2      zero with ``center=false`` (the scales alone move, as in SmoothQuant), and for RMSNormalization, which has no b

Precondition: Linear layers read the output, directly or through layout operations and means of tokens (windows, patch merging,
pooling do the same to a' as to a), nothing else does, and one of them is to be quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import inf
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.linear import Linear, absorb
from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.blocks.residual import readers_of_norm
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.graph import Graph, Node, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Common, Edge, QuantSpec, check_strength, equalizing_scale

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class ReparameterizeLayernorm(Pass):
    """LN(u) W -> LN'(u) W', channel ranges of LN(u) equalized"""

    name = "reparameterize-layernorm"
    requires = frozenset({Fact.CALIBRATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True
    strength: float = 0.5
    common: str = "mean"
    limit: float = inf
    center: bool = True
    spread: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.common not in get_args(Common):
            raise ValueError(f"common must be mean or median, got {self.common}")
        if not (self.limit >= 1 and self.spread >= 1):
            raise ValueError(f"limit and spread must be at least 1, got {self.limit} and {self.spread}")

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in c.graph.find(*NORMS):
            try:
                self._reparameterize(c, node)
                changes += 1
            except MatchFailure as failure:
                self.note(c, node.name, f"{node.op} keeps its ranges: {failure.reason}")
        return changes

    def _reparameterize(self, c: Compilation, node: Node) -> None:
        linears = readers_of_norm(c.graph, node, c.annotations.linears)
        specs = [c.specs[edge] for linear in linears if (edge := Edge(linear.name, 0)) in c.specs]
        if not specs:
            raise MatchFailure("no Linear that is to be quantized reads it")
        width = node.outputs[0].shape[-1]
        inputs = {linear.input.name: linear.in_features // width for linear in linears if linear.input.name in c.table.statistics}
        seen = [part for name, copies in inputs.items() for part in c.table.statistics[name].split(copies)]
        together = reduce(ChannelStatistics.merge, seen)
        if (spread := _spread(together)) < self.spread:
            raise MatchFailure(f"its widest channel is but {spread:.2g} times the median one")
        rule = self if node.op == "LayerNormalization" else replace(self, center=False)
        shift, scale = rule.factors(together, specs[0])
        fold(c.graph, node, linears, shift, scale)
        for name, copies in inputs.items():
            c.table.rescale(name, np.tile(scale, copies), np.tile(shift, copies))

    def factors(self, seen: ChannelStatistics, spec: QuantSpec) -> tuple[Vector, Vector]:
        """(s r2, r1), shape [channels] each, for the observed channel ranges and the quantizer that they are for."""
        width = seen.high - seen.low if self.center else 2 * np.maximum(np.abs(seen.low), np.abs(seen.high))
        live, scale = equalizing_scale(width, self.strength, common=cast(Common, self.common), limit=self.limit)
        if not self.center:
            return np.zeros_like(scale), scale
        codes, middle = (254, 127) if spec.symmetric else (255, 128)  # of 8 bits: the grid of fewer would centre no better
        step = live / codes
        shift = step * (np.rint(-seen.low / step) - middle)
        return shift.astype(np.float32), scale


def _spread(seen: ChannelStatistics) -> float:
    """The width of the widest channel over that of the median one; infinite where the median one never changes."""
    widths = seen.high - seen.low
    middle = float(np.median(widths))
    return float(widths.max()) / middle if middle > 0 else inf


def fold(graph: Graph, node: Node, linears: list[Linear], shift: Vector, scale: Vector) -> None:
    """Replace the output a of a LayerNormalization by (a + shift) / scale and make its readers undo it."""
    gamma = value(node.inputs[1])
    node.inputs[1].values = (gamma / scale).astype(np.float32)
    if len(node.inputs) < 3 and np.any(shift):
        node.inputs.append(graph.constant(f"{node.name}/beta", np.zeros_like(gamma)))
    if len(node.inputs) > 2:
        node.inputs[2].values = ((value(node.inputs[2]) + shift) / scale).astype(np.float32)
    for linear in linears:
        copies = linear.in_features // len(scale)
        absorb(graph, linear, np.tile(shift, copies), np.tile(scale, copies))
