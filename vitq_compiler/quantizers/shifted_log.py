"""Codes at equal ratios after a shift, for values that are not far below zero: after GELU, or probabilities.

    x + shift = top * base^-k,  k = 0 .. 2^bits - 1

With a given shift (0.16997, the depth of GELU) base and top are searched, as AdaLog (arXiv 2407.12951) does at the input of
fc2; with a searched shift the codes span the observed range, as I&S-ViT's SULQ (arXiv 2311.10126) does on probabilities.
SULQ rounds each exponent once more to an integer, so that decoding is a shift of bits: that merges codes and is left out.

``absorbed``: the result keeps the shift, because the bias of the Linear that reads it has taken it away.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log2

import numpy as np

from vitq_compiler.graph import Graph, Tensor
from vitq_compiler.quant import Curve, Float, QuantParams, QuantSpec
from vitq_compiler.quantizer import Box, Point, Quantizer, code, scalar
from vitq_compiler.quantizers.log import BASES, RESOLUTION

SHIFTS = (-10.0, 0.0)  # log2 of the shifts that are searched


@dataclass(frozen=True)
class ShiftedLogCurve(Curve):
    """ln((x + shift) / top), for x + shift within ``least`` and ``top``."""

    shift: float
    least: float
    top: float
    absorbed: bool = False

    def forward(self, x: Float) -> Float:
        shifted = np.clip(x + np.float32(self.shift), np.float32(self.least), np.float32(self.top))
        return np.asarray(np.log(shifted * np.float32(1 / self.top)))

    def inverse(self, t: Float) -> Float:
        values = np.exp(t) * np.float32(self.top)
        return values if self.absorbed else values - np.float32(self.shift)

    def emit(self, graph: Graph, tensor: Tensor) -> Tensor:
        def constant(name: str, number: float) -> Tensor:
            return graph.constant(f"{tensor.name}/{name}", scalar(number))

        t = graph.insert("Add", [tensor, constant("shift", self.shift)], name=f"{tensor.name}/shifted", like=tensor)
        t = graph.insert("Clip", [t, constant("least", self.least), constant("top", self.top)], name=f"{tensor.name}/clip", like=tensor)
        t = graph.insert("Mul", [t, constant("inverse_top", 1 / self.top)], name=f"{tensor.name}/unit", like=tensor)
        return graph.insert("Log", [t], name=f"{tensor.name}/log", like=tensor)

    def emit_inverse(self, graph: Graph, tensor: Tensor) -> Tensor:
        values = graph.insert("Exp", [tensor], name=f"{tensor.name}/exp", like=tensor)
        top = graph.constant(f"{tensor.name}/top", scalar(self.top))
        values = graph.insert("Mul", [values, top], name=f"{tensor.name}/mul", like=tensor)
        if self.absorbed:
            return values
        shift = graph.constant(f"{tensor.name}/shift", scalar(self.shift))
        return graph.insert("Sub", [values, shift], name=f"{tensor.name}/sub", like=tensor)


class ShiftedLog(Quantizer):
    """top * base^-k - shift"""

    name = "shifted-log"

    def box(self, low: float, high: float, spec: QuantSpec) -> Box:
        return (BASES, (-4.0, 0.0)) if spec.shift else (SHIFTS,)

    def start(self, low: float, high: float, spec: QuantSpec) -> Point:
        if not spec.shift:
            return (log2(0.01),)
        return (min(max(_spanning(spec.shift, max(low, -0.99 * spec.shift), high, spec), BASES[0]), BASES[1]), 0.0)

    def spread(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        last = 2**spec.bits - 1
        if spec.shift:
            shift, top = spec.shift, (max(high, 1e-6) + spec.shift) * 2.0 ** point[1]
            exponent = max(1, round(point[0] * RESOLUTION)) / RESOLUTION
        else:
            shift = max(-low, 0.0) + 2.0 ** point[0]
            top = max(high, low + 1e-6, 1e-6) + shift
            exponent = _spanning(shift, low, high, spec)
        curve = ShiftedLogCurve(shift, top * 2.0 ** (-exponent * last), top)
        return QuantParams(scalar(exponent * log(2)), code(last), None, 0, last, curve=curve)


def _spanning(shift: float, low: float, high: float, spec: QuantSpec) -> float:
    """log2 of the base with which the codes reach from ``low`` to ``high``."""
    top = max(high, low + 1e-6, 1e-6) + shift
    return max(log2(top / (low + shift)), 1e-3) / int(2**spec.bits - 1)
