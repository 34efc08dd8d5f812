"""Weights that expect the errors of what comes before them.

    y = x W + c  ->  y = x' V + c',   V = argmin E|x W - x' V|^2 + strength |V - W|^2,   c' = c + E[x] W - E[x'] V

x are the inputs in the float graph, x' those behind all quantizers and compensated layers before; V has a closed form (ridge
regression; first step of ERQ, arXiv 2407.06794, reconstruction of RepQuant, arXiv 2402.05628). ``strength`` is in parts of
the mean energy of an input, so that one number serves all layers; with ``validated`` each layer gets the one with which half of the
batches serves the other half best (and half of it, for twice the samples). Scales of the new weight are computed afresh. ``gptq`` rounds
it with second-order feedback before the next layer is fitted; round-weights, coming later, changes what layers were fitted to. An output
whose error, weights rounded, would not shrink keeps its old weight. ``samples`` is as in round-weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import value
from vitq_compiler.moments import Moments
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, dequantize, quantize
from vitq_compiler.repair import Target, set_bias, sweep
from vitq_compiler.rounding import second_order
from vitq_compiler.weight_scales import choose, fit_scales

STRENGTHS = (0.1, 0.5, 2.0, 10.0, 100.0)  # of which ``validated`` takes one; the last changes hardly anything
OUTPUTS = 64  # of a layer that choose for all


@dataclass(frozen=True)
class CompensateWeights(Pass):
    """x W + c -> x' V + c', fitted by ridge regression to the quantized inputs x'"""

    name = "compensate-weights"
    requires = frozenset({Fact.QPARAMS})
    strength: float = 0.5
    validated: bool = False
    gptq: bool = False
    samples: int = 0

    def __post_init__(self) -> None:
        if not self.strength >= 0 or self.samples < 0:
            raise ValueError(f"strength and samples (0: all) must not be negative, got {self.strength} and {self.samples}")

    def run(self, c: Compilation) -> int:
        def compensate(linear: Linear, target: Target, moments: Moments) -> None:
            edge = Edge(linear.name, 1)
            old = c.params[edge]
            weight = moments.regress(target.weight, self._strength(target, moments))
            new = fit_scales(weight, c.specs[edge], np.diag(moments.other_covariance))
            options = [(old, quantize(value(linear.weight), old)), (new, quantize(weight, new))]
            if self.gptq:
                options.append((new, second_order(weight, new, moments.other_covariance)))
            quantized = [dequantize(codes, params).astype(np.float64) for params, codes in options]
            errors = np.stack([moments.error(target.weight, q) for q in quantized])
            best = errors.argmin(0) if old.axis is not None else np.full(linear.out_features, errors.sum(1).argmin())
            linear.weight.values = np.where(best == 0, value(linear.weight), weight).astype(np.float32)
            c.params[edge] = choose(best == 0, old, new)
            c.rounding.pop(edge, None)
            if self.gptq:
                c.rounding[edge] = np.choose(best, [codes for _, codes in options])
            set_bias(linear, target.bias + moments.bias_offset(target.weight, np.choose(best, quantized)))

        return sweep(c, compensate, "compensating", samples=self.samples, halves=self.validated)

    def _strength(self, target: Target, moments: Moments) -> float:
        """The given one, unless it is to be chosen and there are two batches to do so."""
        if moments.halves is None:
            return self.strength
        one, two = moments.halves
        weight = target.weight[:, :: -(-target.weight.shape[1] // OUTPUTS)]

        def error(strength: float) -> float:
            return sum(float(b.error(weight, a.regress(weight, strength)).sum()) for a, b in ((one, two), (two, one)))

        return min(STRENGTHS, key=error) / 2
