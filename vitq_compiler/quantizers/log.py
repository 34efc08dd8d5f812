"""Codes at equal ratios, for values from 0 to 1: probabilities.

    x = top * base^-k,  k = 0 .. 2^bits - 1

base 2 is the log2 quantizer of FQ-ViT (arXiv 2111.13824), sqrt 2 that of RepQ-ViT (2212.08254), 2^(q/37) with a searched q
that of AdaLog (2407.12951). After a softmax it is LogSoftmax -> QuantizeLinear(uint8, ln base, 2^bits - 1) ->
DequantizeLinear -> Exp: the logarithm costs nothing, the container clips the small end, and ln p <= 0 the large one.
With ``zero`` the smallest code stands for 0, as in the published code, which however spends a code beyond its budget on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log2

import numpy as np

from vitq_compiler.graph import Graph, Tensor, producer
from vitq_compiler.quant import Curve, Float, QuantParams, QuantSpec
from vitq_compiler.quantizer import Box, Point, Quantizer, code, scalar

RESOLUTION = 37  # r of AdaLog: bases are 2^(q/r)
BASES = (1 / RESOLUTION, 138 / RESOLUTION)  # log2 of the smallest and largest base; AdaLog begins at 10 / r, too coarse for 8 bits
NEAR_ONE = 0.7  # a range that ends here or above is covered up to 1, which needs no operators; a code reaches that far anyway
OCTAVES = 15  # what the codes span before a search: 2^-15 is as good as zero among probabilities
TINY = 2.0**-60  # what log(0) is computed of: below every code


@dataclass(frozen=True)
class LogCurve(Curve):
    """ln(x / top); what lies below ``floor`` comes back as 0."""

    top: float = 1.0
    floor: float = 0.0

    def forward(self, x: Float) -> Float:
        return np.minimum(np.log(np.maximum(x, np.float32(TINY))) - np.float32(log(self.top)), np.float32(0))

    def inverse(self, t: Float) -> Float:
        values = np.exp(t + np.float32(log(self.top)))
        return np.where(values > np.float32(self.floor), values, np.float32(0))

    def emit(self, graph: Graph, tensor: Tensor) -> Tensor:
        source = producer(tensor)
        name = tensor.name
        if source is not None and source.op == "Softmax":
            t = graph.insert("LogSoftmax", list(source.inputs), name=f"{name}/log", like=tensor, axis=source.attrs.get("axis", -1))
        else:
            least = graph.constant(f"{name}/tiny", scalar(TINY))
            t = graph.insert(
                "Log", [graph.insert("Max", [tensor, least], name=f"{name}/max", like=tensor)], name=f"{name}/log", like=tensor
            )
        if self.top == 1.0 and source is not None and source.op == "Softmax":
            return t
        t = graph.insert("Sub", [t, graph.constant(f"{name}/log_top", scalar(log(self.top)))], name=f"{name}/sub", like=tensor)
        return graph.insert("Min", [t, graph.constant(f"{name}/zero", scalar(0.0))], name=f"{name}/min", like=tensor)

    def emit_inverse(self, graph: Graph, tensor: Tensor) -> Tensor:
        if self.top != 1.0:
            constant = graph.constant(f"{tensor.name}/log_top", scalar(log(self.top)))
            tensor = graph.insert("Add", [tensor, constant], name=f"{tensor.name}/add", like=tensor)
        values = graph.insert("Exp", [tensor], name=f"{tensor.name}/exp", like=tensor)
        if self.floor:
            values = graph.insert("ThresholdedRelu", [values], name=f"{tensor.name}/zero", like=tensor, alpha=self.floor)
        return values


class Log(Quantizer):
    """top * base^-k"""

    name = "log"

    def box(self, low: float, high: float, spec: QuantSpec) -> Box:
        return ((-4.0, 0.0),) if spec.base else (BASES, (-4.0, 0.0))

    def start(self, low: float, high: float, spec: QuantSpec) -> Point:
        top = max(-4.0, log2(high)) if 0 < high < NEAR_ONE else 0.0
        return (top,) if spec.base else (OCTAVES / (2**spec.bits - 1), top)

    def spread(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        exponent = log2(spec.base) if spec.base else max(1, round(point[0] * RESOLUTION)) / RESOLUTION
        last = 2**spec.bits - 1
        top = 2.0 ** point[-1]
        floor = top * 2.0 ** (-exponent * (last - 0.5)) if spec.zero else 0.0
        return QuantParams(scalar(exponent * log(2)), code(last), None, 0, last, curve=LogCurve(top, floor))
