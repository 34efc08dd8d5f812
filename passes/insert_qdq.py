"""QuantizeLinear and DequantizeLinear where params say so.

    x -> MatMul(DQ(Q(x)), DQ(codes of W)) + c

Each tensor is quantized once for all readers with the same parameters. Weights are stored as codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.graph import Graph, Tensor, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import QuantParams, dequantize, quantize


@dataclass(frozen=True)
class InsertQdq(Pass):
    """MatMul(x, W) -> MatMul(DQ(Q(x)), DQ(W_int8))"""

    name = "insert-qdq"
    requires = frozenset({Fact.QPARAMS})
    provides = frozenset({Fact.QUANTIZED})

    def run(self, c: Compilation) -> int:
        dequantized: dict[tuple[str, float, int, int, int], Tensor] = {}
        for edge, params in c.params.items():
            node = c.graph.node(edge.node)
            tensor = node.inputs[edge.index]
            if edge.index == 1:
                node.inputs[1] = dequantize_constant(c.graph, tensor.name, quantize(value(tensor), params), params)
                c.codes[edge] = node.inputs[1].inputs[0].inputs[0].name
                continue
            key = (tensor.name, float(params.scale), int(params.zero_point), params.quant_min, params.quant_max)
            if key not in dequantized:
                dequantized[key] = quantize_activation(c.graph, tensor, params)
            node.inputs[0] = dequantized[key]
        c.graph.clean()
        return len(c.params)


def quantize_activation(graph: Graph, tensor: Tensor, params: QuantParams) -> Tensor:
    """``tensor`` behind a QuantizeLinear and a DequantizeLinear with shared scale and zero point.

    Fewer than 8 bits are exact in the 8-bit container: a Clip to the values of the first and last code comes before.
    """
    if params.quant_max - params.quant_min < np.iinfo(params.dtype).max - np.iinfo(params.dtype).min:
        ends = [
            graph.constant(f"{tensor.name}/{n}", dequantize(np.asarray(code), params))
            for n, code in (("low", params.quant_min), ("high", params.quant_max))
        ]
        tensor = graph.insert("Clip", [tensor, *ends], name=f"{tensor.name}/clip", like=tensor)
    scale = graph.constant(f"{tensor.name}/scale", params.scale)
    zero_point = graph.constant(f"{tensor.name}/zero_point", params.zero_point.astype(params.dtype))
    codes = graph.insert("QuantizeLinear", [tensor, scale, zero_point], name=f"{tensor.name}/q")
    codes.dtype, codes.shape = params.dtype, tensor.shape
    return graph.insert("DequantizeLinear", [codes, scale, zero_point], name=f"{tensor.name}/dq", like=tensor)


def dequantize_constant(graph: Graph, name: str, codes: np.ndarray, params: QuantParams) -> Tensor:
    """A stored constant of codes behind a DequantizeLinear."""
    inputs = [
        graph.constant(f"{name}/codes", codes),
        graph.constant(f"{name}/scale", params.scale),
        graph.constant(f"{name}/zero_point", params.zero_point.astype(codes.dtype)),
    ]
    output = graph.insert("DequantizeLinear", inputs, name=f"{name}/dq", axis=params.axis)
    output.dtype, output.shape = np.dtype(np.float32), list(codes.shape)
    return output
