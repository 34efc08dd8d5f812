"""QuantizeLinear and DequantizeLinear where params say so; see `qdq`."""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.qdq import insert_qdq


@dataclass(frozen=True)
class InsertQdq(Pass):
    """MatMul(x, W) -> MatMul(DQ(Q(x)), DQ(W_int8))"""

    name = "insert-qdq"
    requires = frozenset({Fact.QPARAMS})
    provides = frozenset({Fact.QUANTIZED})

    def run(self, c: Compilation) -> int:
        c.codes.update(insert_qdq(c.graph, c.params, c.rounding))
        return len(c.params)
