"""Codes closest together at the large end, for values from 0: probabilities, of which the largest carry the result.

    tan(kappa * x / top) = tan(kappa) * code / (2^bits - 1)

The idea is TanQ of DopQ-ViT (arXiv 2408.03291): a tangent, quantized evenly, and its inverse. Its equation and constants
could not be verified; this one has every property that the text states, and is the uniform quantizer as kappa goes to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import tan

import numpy as np

from vitq_compiler.graph import Graph, Tensor
from vitq_compiler.quant import Curve, Float, QuantParams, QuantSpec
from vitq_compiler.quantizer import Box, Point, Quantizer, code, scalar

KAPPAS = (0.05, 1.5)  # the tangent grows without bound at pi / 2


@dataclass(frozen=True)
class TanCurve(Curve):
    """tan(kappa * x / top) for x within 0 and top."""

    kappa: float
    top: float

    def forward(self, x: Float) -> Float:
        return np.asarray(np.tan(np.clip(x, np.float32(0), np.float32(self.top)) * np.float32(self.kappa / self.top)))

    def inverse(self, t: Float) -> Float:
        return np.arctan(t) * np.float32(self.top / self.kappa)

    def emit(self, graph: Graph, tensor: Tensor) -> Tensor:
        ends = [graph.constant(f"{tensor.name}/{n}", scalar(number)) for n, number in (("zero", 0.0), ("top", self.top))]
        t = graph.insert("Clip", [tensor, *ends], name=f"{tensor.name}/clip", like=tensor)
        factor = graph.constant(f"{tensor.name}/kappa", scalar(self.kappa / self.top))
        t = graph.insert("Mul", [t, factor], name=f"{tensor.name}/angle", like=tensor)
        return graph.insert("Tan", [t], name=f"{tensor.name}/tan", like=tensor)

    def emit_inverse(self, graph: Graph, tensor: Tensor) -> Tensor:
        angle = graph.insert("Atan", [tensor], name=f"{tensor.name}/atan", like=tensor)
        factor = graph.constant(f"{tensor.name}/inverse_kappa", scalar(self.top / self.kappa))
        return graph.insert("Mul", [angle, factor], name=f"{tensor.name}/mul", like=tensor)


class Tan(Quantizer):
    """(top / kappa) * atan(tan(kappa) * code / (2^bits - 1))"""

    name = "tan"

    def box(self, low: float, high: float, spec: QuantSpec) -> Box:
        return (KAPPAS, (-3.0, 0.0))

    def start(self, low: float, high: float, spec: QuantSpec) -> Point:
        return (0.5, 0.0)

    def spread(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        last = 2**spec.bits - 1
        kappa, top = point[0], max(high, 1e-6) * 2.0 ** point[1]
        return QuantParams(scalar(tan(kappa) / last), code(0), None, 0, last, curve=TanCurve(kappa, top))
