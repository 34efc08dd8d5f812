"""The shift of a shifted logarithm, moved into the bias of the Linear layers that read it.

    (e^t - shift) W_q + c  ->  e^t W_q + (c - shift * sum of the rows of W_q)

The bias reparameterization of AdaLog (arXiv 2407.12951), with the weight as it will be stored: with the float weight the
rounding error of every row would be multiplied by the shift. To be run when no weight is rounded anew any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vitq_compiler.blocks.linear import add_to_bias
from vitq_compiler.graph import value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.qdq import quantized_weight
from vitq_compiler.quant import Edge
from vitq_compiler.quantizers.shifted_log import ShiftedLogCurve


@dataclass(frozen=True)
class AbsorbShift(Pass):
    """(e^t - shift) W + c -> e^t W + (c - shift 1 W)"""

    name = "absorb-shift"
    requires = frozenset({Fact.QPARAMS})

    def run(self, c: Compilation) -> int:
        changes = 0
        for linear in c.annotations.linears:
            edges = Edge(linear.name, 0), Edge(linear.name, 1)
            params = c.params.get(edges[0])
            if params is None or not isinstance(params.curve, ShiftedLogCurve) or params.curve.absorbed:
                continue
            weight = value(linear.weight)
            if edges[1] in c.params:
                weight = quantized_weight(c, edges[1], weight)
            add_to_bias(c.graph, linear, -params.curve.shift * weight.sum(0, np.float64))
            c.params[edges[0]] = replace(params, curve=replace(params.curve, absorbed=True))
            changes += 1
        return changes
