"""The mean error that a quantized weight makes, taken out of the bias.

    x W_q + c  ->  x W_q + (c + E[x] (W - W_q))

E[x] is the mean activation per channel of the float model, from calibration; the output then has the right mean for
every channel (bias correction of Data-Free Quantization, arXiv 1906.04721, with measured means). Costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import add_to_bias
from vitq_compiler.graph import value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.qdq import quantized_weight
from vitq_compiler.quant import Edge


@dataclass(frozen=True)
class CorrectBias(Pass):
    """x W_q + c -> x W_q + c + E[x] (W - W_q)"""

    name = "correct-bias"
    requires = frozenset({Fact.CALIBRATED, Fact.QPARAMS})

    def run(self, c: Compilation) -> int:
        changes = 0
        for linear in c.annotations.linears:
            edge = Edge(linear.name, 1)
            if edge not in c.params:
                continue
            weight = value(linear.weight)
            mean = c.table.statistics[linear.input.name].mean.astype(np.float64)
            add_to_bias(c.graph, linear, mean @ (weight - quantized_weight(c, edge, weight)))
            changes += 1
        return changes
