"""QuantizeLinear and DequantizeLinear into a graph: for the output, and for simulations of partly quantized graphs.

    x -> MatMul(DQ(Q(x)), DQ(codes of W)) + c

Each tensor is quantized once for all readers with the same parameters. Weights are stored as codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.graph import Graph, Tensor, is_constant, value
from vitq_compiler.quant import Edge, QuantParams, dequantize, quantize

if TYPE_CHECKING:
    from vitq_compiler.pipeline import Compilation

Codes = NDArray[Any]


def insert_qdq(graph: Graph, params: Mapping[Edge, QuantParams], rounding: Mapping[Edge, Codes]) -> dict[Edge, str]:
    """Quantize edges in place.

    Args:
        graph: what to edit.
        params: the edges and their numbers.
        rounding: codes of weights that shall not be rounded to nearest, in the shape of the weight.

    Returns:
        Weight edge -> name of the initializer that holds its codes.
    """
    dequantized: dict[tuple[Any, ...], Tensor] = {}
    stored: dict[Edge, str] = {}
    nodes = {node.name: node for node in graph.nodes}
    for edge, numbers in params.items():
        node = nodes[edge.node]
        tensor = node.inputs[edge.index]
        if is_constant(tensor):
            codes = rounding[edge] if edge in rounding else quantize(value(tensor), numbers)
            node.inputs[edge.index] = dequantize_constant(graph, tensor.name, codes, numbers)
            stored[edge] = node.inputs[edge.index].inputs[0].inputs[0].name
            continue
        key = (tensor.name, float(numbers.scale), int(numbers.zero_point), numbers.quant_min, numbers.quant_max, numbers.curve)
        if key not in dequantized:
            dequantized[key] = quantize_activation(graph, tensor, numbers)
        node.inputs[edge.index] = dequantized[key]
    graph.clean()
    return stored


def simulate(c: Compilation, edges: Mapping[Edge, QuantParams] | None = None) -> Graph:
    """A copy of the graph in which ``edges`` (None: all that have params) are quantized; node names stay."""
    copy = c.graph.snapshot()
    insert_qdq(copy, c.params if edges is None else edges, c.rounding)
    return copy


def quantized_weight(c: Compilation, edge: Edge, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the integer graph computes with in place of ``weight``, which is the constant at ``edge``."""
    numbers = c.params[edge]
    return dequantize(c.rounding[edge] if edge in c.rounding else quantize(weight, numbers), numbers)


def quantize_activation(graph: Graph, tensor: Tensor, params: QuantParams) -> Tensor:
    """``tensor`` behind a QuantizeLinear and a DequantizeLinear with shared scale and zero point, and its curve around them.

    Fewer than 8 bits are exact in the 8-bit container: a Clip to the values of the first and last code comes before; a curve ends
    at the codes by itself where its container is unsigned.
    """
    if params.curve is not None:
        tensor = params.curve.emit(graph, tensor)
    if params.format == "int" and (params.curve is None or params.signed) and _has_spare_codes(params):
        values = {n: (code - params.zero_point) * params.scale for n, code in (("low", params.quant_min), ("high", params.quant_max))}
        ends = [graph.constant(f"{tensor.name}/{n}", end.astype(np.float32)) for n, end in values.items()]
        tensor = graph.insert("Clip", [tensor, *ends], name=f"{tensor.name}/clip", like=tensor)
    scale = graph.constant(f"{tensor.name}/scale", params.scale)
    zero_point = graph.constant(f"{tensor.name}/zero_point", params.zero_point.astype(params.dtype))
    codes = graph.insert("QuantizeLinear", [tensor, scale, zero_point], name=f"{tensor.name}/q")
    codes.dtype, codes.shape = params.dtype, tensor.shape
    result = graph.insert("DequantizeLinear", [codes, scale, zero_point], name=f"{tensor.name}/dq", like=tensor)
    return result if params.curve is None else params.curve.emit_inverse(graph, result)


def _has_spare_codes(params: QuantParams) -> bool:
    """Whether the container holds more than the codes; symmetric int8 leaves its lowest to itself."""
    container = np.iinfo(params.dtype)
    return max(params.quant_min - container.min, container.max - params.quant_max) > 1


def dequantize_constant(graph: Graph, name: str, codes: Codes, params: QuantParams) -> Tensor:
    """A stored constant of codes behind a DequantizeLinear."""
    inputs = [
        graph.constant(f"{name}/codes", codes),
        graph.constant(f"{name}/scale", params.scale),
        graph.constant(f"{name}/zero_point", params.zero_point.astype(codes.dtype)),
    ]
    output = graph.insert("DequantizeLinear", inputs, name=f"{name}/dq", axis=params.axis)
    output.dtype, output.shape = np.dtype(np.float32), list(codes.shape)
    return output
