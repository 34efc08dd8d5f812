"""The error that a quantized layer makes on average, taken out of its bias.

    mean:    x W_q + c  ->  x W_q + (c + E[x] (W - W_q))
    affine:  x' W_q + c  ->  x' (a W_q) + c',   a = cov(x' W_q, x W) / var(x' W_q),   c' = c + E[x] W - E[x'] a W_q

``mean`` takes E[x], the mean activation per channel of the float model, from calibration (bias correction of Data-Free
Quantization, arXiv 1906.04721, with measured means). ``affine`` walks through the network with the inputs x' of the quantized
graph, and also scales each output by a factor between 0.5 and 2 (QwT-v2, arXiv 2505.20932), which goes into the weight's
scale; it comes after rounding. Neither costs anything at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vitq_compiler.blocks.linear import Linear, add_to_bias
from vitq_compiler.graph import value
from vitq_compiler.moments import Moments
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.qdq import quantized_weight
from vitq_compiler.quant import Edge
from vitq_compiler.repair import Target, deployed, repairable, set_bias, sweep

METHODS = ("mean", "affine")


@dataclass(frozen=True)
class CorrectBias(Pass):
    """x W_q + c -> x W_q + c + E[x] (W - W_q), or with a factor for each output"""

    name = "correct-bias"
    requires = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    method: str = "mean"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method}")

    def run(self, c: Compilation) -> int:
        if self.method == "affine":
            return sweep(c, lambda linear, target, moments: _fit(c, linear, target, moments), "correcting")
        for linear in repairable(c):
            weight = value(linear.weight)
            mean = c.table.statistics[linear.input.name].mean.astype(np.float64)
            add_to_bias(c.graph, linear, mean @ (weight - quantized_weight(c, Edge(linear.name, 1), weight)))
        return len(repairable(c))


def _fit(c: Compilation, linear: Linear, target: Target, moments: Moments) -> None:
    edge, weight = Edge(linear.name, 1), deployed(c, linear)
    params = c.params[edge]
    if params.axis is None:
        factor = np.ones(linear.out_features)  # one scale for all outputs has no place for a factor of each
    else:
        factor = moments.affine(target.weight, weight)
        c.params[edge] = replace(params, scale=(params.scale * factor).astype(np.float32))
        linear.weight.values = (value(linear.weight) * factor).astype(np.float32)
    set_bias(linear, target.bias + moments.bias_offset(target.weight, weight * factor))
