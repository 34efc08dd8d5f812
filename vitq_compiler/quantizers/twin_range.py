"""Two ranges with a step each, half of the codes in either: PTQ4ViT (arXiv 2111.12293).

    x = knee + fine * (code - half)   below the knee,    knee + coarse * (code - half)   above it,   half = 2^(bits - 1)

After GELU the knee is 0: the narrow negative range has small steps of its own, as published. For probabilities the knee is
searched; PTQ4ViT lets its coarse codes begin at 0 again, where the fine ones already lie, and here they begin at the knee.
Emitted as LeakyRelu, whose slope is the ratio of the steps, around QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.graph import Graph, Tensor
from vitq_compiler.quant import Curve, Float, QuantParams, QuantSpec
from vitq_compiler.quantizer import NARROWEST, Box, Point, Quantizer, code, scalar


@dataclass(frozen=True)
class TwinRangeCurve(Curve):
    """(x - knee), times ``slope`` where that is negative, for x within ``low`` and ``high``."""

    knee: float
    slope: float
    low: float
    high: float

    def forward(self, x: Float) -> Float:
        above = np.clip(x, np.float32(self.low), np.float32(self.high)) - np.float32(self.knee)
        return np.where(above < 0, above * np.float32(self.slope), above)

    def inverse(self, t: Float) -> Float:
        return np.where(t < 0, t * np.float32(1 / self.slope), t) + np.float32(self.knee)

    def emit(self, graph: Graph, tensor: Tensor) -> Tensor:
        ends = [graph.constant(f"{tensor.name}/{n}", scalar(number)) for n, number in (("low", self.low), ("high", self.high))]
        t = graph.insert("Clip", [tensor, *ends], name=f"{tensor.name}/clip", like=tensor)
        if self.knee:
            t = graph.insert("Sub", [t, graph.constant(f"{tensor.name}/knee", scalar(self.knee))], name=f"{tensor.name}/sub", like=tensor)
        return graph.insert("LeakyRelu", [t], name=f"{tensor.name}/twin", like=tensor, alpha=self.slope)

    def emit_inverse(self, graph: Graph, tensor: Tensor) -> Tensor:
        x = graph.insert("LeakyRelu", [tensor], name=f"{tensor.name}/twin", like=tensor, alpha=1 / self.slope)
        if not self.knee:
            return x
        return graph.insert("Add", [x, graph.constant(f"{tensor.name}/knee", scalar(self.knee))], name=f"{tensor.name}/add", like=tensor)


class TwinRange(Quantizer):
    """knee + (fine or coarse) * (code - 2^(bits - 1))"""

    name = "twin-range"

    def box(self, low: float, high: float, spec: QuantSpec) -> Box:
        return ((NARROWEST, 0.0), (NARROWEST, 0.0)) if low < 0 else ((-8.0, -0.5),)

    def start(self, low: float, high: float, spec: QuantSpec) -> Point:
        return (0.0, 0.0) if low < 0 else (-3.0,)

    def spread(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        half, high = 2 ** (spec.bits - 1), max(high, 1e-6)
        if low < 0:
            knee, bottom, top = 0.0, low * 2.0 ** point[0], high * 2.0 ** point[1]
        else:
            knee, bottom, top = high * 2.0 ** point[0], 0.0, high
        fine, coarse = (knee - bottom) / half, (top - knee) / (half - 1)
        curve = TwinRangeCurve(knee, coarse / fine, bottom, top)
        return QuantParams(scalar(coarse), code(half), None, 0, 2 * half - 1, curve=curve)
