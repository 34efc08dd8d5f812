"""Every Linear layer in one form: MatMul(x, weight[K, N]), then Add(., bias[N]).

Gemm(x, W, c; alpha, beta, transB)  ->  Add(MatMul(x, alpha * W'), beta * c)
Add(bias, MatMul(x, W))             ->  Add(MatMul(x, W), bias)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, value
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class SeparateLinears(Pass):
    """Gemm(x, W, c) -> Add(MatMul(x, W), c)"""

    name = "separate-linears"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in c.graph.find("Gemm"):
            changes += _split_gemm(c.graph, node)
        for node in c.graph.find("Add"):
            changes += _order_bias(node)
        c.graph.clean()
        return changes


def _split_gemm(graph: Graph, node: Node) -> int:
    x, weight, *rest = node.inputs
    bias = rest[0] if rest and rest[0].name else None
    if not is_constant(weight) or node.attrs.get("transA", 0) or not (bias is None or _is_per_feature(bias, node)):
        return 0
    matrix = value(weight).T if node.attrs.get("transB", 0) else value(weight)
    matrix = np.float32(node.attrs.get("alpha", 1.0)) * matrix
    output = graph.insert("MatMul", [x, graph.constant(f"{node.name}/weight", matrix)], name=f"{node.name}/matmul", like=node.outputs[0])
    if bias is not None:
        offset = np.float32(node.attrs.get("beta", 1.0)) * np.broadcast_to(value(bias).reshape(-1), (matrix.shape[1],))
        output = graph.insert("Add", [output, graph.constant(f"{node.name}/bias", offset)], name=f"{node.name}/add", like=node.outputs[0])
    graph.replace(node.outputs[0], output)
    graph.remove(node)
    return 1


def _is_per_feature(bias: Tensor, node: Node) -> bool:
    """Whether ``bias`` is one number, or one per output feature; Gemm also takes one per row."""
    features = value(node.inputs[1]).shape[0 if node.attrs.get("transB", 0) else 1]
    return is_constant(bias) and (value(bias).size == 1 or (value(bias).size == features and value(bias).shape[-1] == features))


def _order_bias(node: Node) -> int:
    bias, product = node.inputs
    matmul = producer(product)
    if matmul is None or matmul.op != "MatMul" or not is_constant(bias) or not is_constant(matmul.inputs[1]):
        return 0
    node.inputs = [product, bias]
    return 1
