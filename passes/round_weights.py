"""Codes of a weight chosen for what the layer gives out, not for the weight.

    round(W)  ->  V on the grid with less  E|x W - x' V|^2

Layer by layer in the order of the network, x' being the inputs behind all quantizers and rounded layers before. Methods:
``nearest``; ``gptq``, row by row with second-order feedback (arXiv 2210.17323); ``gptaq``, the same with the error of the inputs
in it (arXiv 2504.02692); ``greedy``, single codes moved while that helps (arXiv 2407.06794). ``flips`` does the last after any
of them. After compensate-weights the error of the inputs is already in the weights, and gptaq is gptq. For each output the
best of what the method and its simpler forms give is taken, so no output gets worse than nearest; the bias follows. Where more
``samples`` are there for a training to come, the first 512 or so are enough here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import value
from vitq_compiler.moments import Moments
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, QuantParams, dequantize, quantize
from vitq_compiler.repair import Target, set_bias, sweep
from vitq_compiler.rounding import Codes, Matrix, damped, flip, second_order

METHODS = ("nearest", "gptq", "gptaq", "greedy")
GREEDY_FLIPS = 100


@dataclass(frozen=True)
class RoundWeights(Pass):
    """round(W) -> V on the same grid, nearer to x W on the inputs the layer will see"""

    name = "round-weights"
    requires = frozenset({Fact.QPARAMS})
    method: str = "gptaq"
    damping: float = 0.01
    act_order: bool = True
    flips: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method}")
        if not self.damping > 0 or self.flips < 0 or self.samples < 0:
            got = f"{self.damping}, {self.flips} and {self.samples}"
            raise ValueError(f"damping must be positive, flips and samples (0: all) not negative, got {got}")

    def run(self, c: Compilation) -> int:
        def round_layer(linear: Linear, target: Target, moments: Moments) -> None:
            edge = Edge(linear.name, 1)
            params, weight = c.params[edge], value(linear.weight).astype(np.float64)
            nearest = quantize(weight, params)
            candidates = [nearest, *self._candidates(weight, params, target, moments)]
            errors = np.stack([moments.error(target.weight, dequantize(codes, params).astype(np.float64)) for codes in candidates])
            c.rounding[edge] = np.choose(errors.argmin(0), candidates)
            chosen = dequantize(c.rounding[edge], params).astype(np.float64)
            set_bias(linear, target.bias + moments.bias_offset(target.weight, chosen))

        return sweep(c, round_layer, "rounding", samples=self.samples)

    def _candidates(self, weight: Matrix, params: QuantParams, target: Target, moments: Moments) -> list[Codes]:
        hessian = moments.other_covariance
        found = []
        if self.method in ("gptq", "gptaq"):
            found.append(second_order(weight, params, hessian, damping=self.damping, reorder=self.act_order))
        if self.method == "gptaq" and np.array_equal(weight, target.weight):
            lost = moments.cross.T - hessian
            found.append(second_order(weight, params, hessian, cross=lost, damping=self.damping, reorder=self.act_order))
        flips = self.flips or (GREEDY_FLIPS if self.method == "greedy" else 0)
        if flips:
            stiff = damped(hessian, self.damping)
            goal = moments.cross @ target.weight + (stiff - hessian) @ weight
            found.append(flip(found[-1] if found else quantize(weight, params), params, goal, stiff, flips))
        return found
