"""Channel ranges of the proj input, moved into the value Linear and proj.

    o = P v,  o W + c  ->  o' = P (v diag(1/r)),  o' (diag(r) W) + c,   r = (range / mean range)^strength

Every channel of o is a mean of the same channel of v, so a positive scale per channel of v passes through (the v/proj
half of the scale moves of SmoothQuant, arXiv 2211.10438; also AdaLog's and APHQ-ViT's per-head scales made static).

Precondition: v is read by this attention alone, as values alone, and o by proj alone. Of queries and keys nothing is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Values, scale_features
from vitq_compiler.blocks.linear import absorb
from vitq_compiler.passes._heads import private, values
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, check_strength, equalizing_scale


@dataclass(frozen=True)
class EqualizeValues(Pass):
    """P v W -> P (v diag(1/r)) (diag(r) W)"""

    name = "equalize-values"
    requires = frozenset({Fact.CALIBRATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True
    strength: float = 0.5

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def run(self, c: Compilation) -> int:
        changes = 0
        does = "values keep their ranges"
        for attention in private(self, c, values(self, c, does), "v", does):
            if Edge(attention.proj.name, 0) in c.specs:
                self._equalize(c, attention)
                changes += 1
            else:
                self.note(c, attention.proj.block, f"{does}: proj stays in float")
        return changes

    def _equalize(self, c: Compilation, attention: Values) -> None:
        seen = c.table.statistics[attention.proj.input.name]
        _, ratio = equalizing_scale(np.maximum(np.abs(seen.low), np.abs(seen.high)), self.strength)
        scale_features(attention.v, 1 / ratio)
        absorb(c.graph, attention.proj, np.zeros_like(ratio), ratio)
        c.table.rescale(attention.proj.input.name, ratio, np.zeros_like(ratio))
        operand = attention.context.inputs[1].name if attention.fused is None else ""
        if (known := c.table.statistics.get(operand)) is not None:
            # Of heads counted into the batch only the ranges of all together are known: the widest they can have become.
            own = ratio if known.low.size == ratio.size else ratio.reshape(-1, known.low.size).min(0)
            c.table.rescale(operand, own, np.zeros_like(own))
