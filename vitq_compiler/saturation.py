"""What a graph computes on an x86 CPU without VNNI, on any CPU: what saturation takes is taken out of every product.

    y  ->  y - s sum over pairs of (p - clip(p, -32768, 32767)),   p = a[2i] w[2i, n] + a[2i+1] w[2i+1, n]

Only pairs of weights that can saturate are looked at (`lint.products`), a few in a hundred. Convolutions and operators that also
quantize their output are left as they are.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from vitq_compiler.graph import Graph, Node, Tensor, producer, value
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.products import SHIFT, Product, products
from vitq_compiler.pairs import INT16

SCALED = ("MatMul", "Gemm")  # of dequantized operands
BARE = ("MatMulInteger",)  # of codes


def saturates(graph: Graph) -> bool:
    """Whether any product of the graph could saturate."""
    return any(product.overflowing[0].size for product in _products(graph))


def saturated(graph: Graph) -> Graph:
    """A copy of ``graph`` whose products lose what saturation takes from them."""
    copy = graph.snapshot()
    nodes = {node.name: node for node in copy.nodes}
    for product in _products(copy):
        node = nodes.get(product.node.name)
        if node is not None and product.overflowing[0].size and node.op in (*SCALED, *BARE):
            _saturate(copy, node, product)
    return copy.clean()


def _products(graph: Graph) -> list[Product]:
    proto, weights = graph.without_weights()
    return list(products(Model(proto, weights=weights)))


def _saturate(graph: Graph, node: Node, product: Product) -> None:
    pair, output = product.overflowing
    order = np.argsort(output, kind="stable")  # by output, so that a running sum gives the sum of each
    pair, output = pair[order], output[order]
    codes, scale = _codes(graph, node, product)
    name, result = node.name, node.outputs[0]

    def add(op: str, *inputs: Tensor, dtype: type = np.float32, **attributes: object) -> Tensor:
        made = graph.insert(op, inputs, name=f"{name}/saturation/{op.lower()}", **attributes)
        made.dtype = np.dtype(dtype)
        return made

    def constant(of: object, dtype: type) -> Tensor:
        return graph.constant(f"{name}/saturation", np.asarray(of, dtype))

    total: Tensor | None = None
    for side in (0, 1):
        row = 2 * pair + side
        known = row < len(product.weight)  # the last one may have no partner
        weight = np.where(known, product.weight[np.minimum(row, len(product.weight) - 1), output], 0)
        one = add("Mul", add("Gather", codes, constant(np.where(known, row, 0), np.int64), axis=-1), constant(weight, np.float32))
        total = one if total is None else add("Add", total, one)
    clipped = add("Clip", total, constant(INT16.min, np.float32), constant(INT16.max, np.float32))
    lost = add("Cast", add("Sub", total, clipped), dtype=np.float64, to=TensorProto.DOUBLE)
    running = add("CumSum", lost, constant(-1, np.int64), dtype=np.float64)
    ends = np.searchsorted(output, np.arange(product.weight.shape[1]), side="right")
    before = np.concatenate([[0], ends[:-1]])
    sums = []
    for places in (ends, before):
        found = add("Gather", running, constant(np.maximum(places - 1, 0), np.int64), dtype=np.float64, axis=-1)
        sums.append(add("Mul", found, constant(places > 0, np.float64), dtype=np.float64))
    loss = add("Sub", *sums, dtype=np.float64)
    whole = scale is None  # the product stays a sum of codes
    loss = add("Cast", loss, dtype=np.int32 if whole else np.float32, to=TensorProto.INT32 if whole else TensorProto.FLOAT)
    if scale is not None:
        loss = add("Mul", loss, scale)
    after = graph.insert("Sub", [result, loss], name=f"{name}/saturated", like=result)
    graph.replace(result, after)


def _codes(graph: Graph, node: Node, product: Product) -> tuple[Tensor, Tensor | None]:
    """Activation codes as the kernel sees them, uint8 in float32, and what a unit of the product is worth (None: it stays a number)."""
    name, codes, scale = f"{node.name}/saturation", node.inputs[0], None
    if node.op in SCALED:
        first, second = (source for t in node.inputs[:2] if (source := producer(t)) is not None)  # both are dequantized
        codes = first.inputs[0]
        scale = graph.constant(name, (value(first.inputs[1]) * value(second.inputs[1])).astype(np.float32))
    wide = graph.insert("Cast", [codes], name=f"{name}/codes", to=TensorProto.FLOAT)
    if codes.dtype == np.dtype(np.int8):
        wide = graph.insert("Add", [wide, graph.constant(name, np.asarray(SHIFT, np.float32))], name=f"{name}/shifted")
    wide.dtype = np.dtype(np.float32)
    return wide, scale
