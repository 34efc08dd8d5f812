"""Linear layers on tokens where an optimizer has put them on rows.

    Reshape[-1, K](x) -> MatMul W + c -> Reshape[.., N]   ->   Reshape[B, T, K](x) -> MatMul W + c -> Reshape[.., N]

onnxsim, onnxslim and others turn MatMul and Add into Gemm, which takes matrices only, and merge the Reshapes around it with
those that split heads: then no tensor shows where a sample ends. What works row by row is moved in front of the flattening.
Precondition: the tensor that is flattened has the batch as its first axis and is static otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, value
from vitq_compiler.pipeline import Compilation, Fact, Pass

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Elu", "LeakyRelu", "Clip"})


@dataclass(frozen=True)
class UnflattenLinears(Pass):
    """Reshape[-1, K](x) -> MatMul -> Reshape -> MatMul on [B, T, K]"""

    name = "unflatten-linears"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        graph, changes = c.graph, 0
        tokens: dict[int, Tensor] = {}  # id of a tensor [rows, C] -> the same numbers as [B, T, C]
        for node in list(graph.clean().nodes):
            if node.op == "Reshape":
                _unflatten(graph, node, tokens)
            elif _is_rowwise(node, tokens):
                _move(graph, node, tokens)
                changes += 1
        if changes:
            _merge_reshapes(graph)
            graph.clean().infer_shapes()
        return changes


def _unflatten(graph: Graph, node: Node, tokens: dict[int, Tensor]) -> None:
    source, rows = node.inputs[0], node.outputs[0]
    shape = list(source.shape or [])
    if len(shape) < 3 or len(rows.shape or ()) != 2 or not isinstance(rows.shape[1], int):
        return
    if not all(isinstance(d, int) and d > 0 for d in shape[1:]):
        return
    width = rows.shape[1]
    count, rest = divmod(prod(shape[1:]), width)
    if rest or count < 2:
        return
    if shape[1:] != [count, width]:
        target = graph.constant(f"{node.name}/tokens", np.array([-1, count, width], np.int64))
        source = graph.insert("Reshape", [source, target], name=f"{node.name}/tokens", like=source)
        source.shape = [shape[0], count, width]
    tokens[id(rows)] = source


def _is_rowwise(node: Node, tokens: dict[int, Tensor]) -> bool:
    """Whether ``node`` computes each row of its output from that row of its inputs, all of which are known as tokens."""
    constants, activations = ([t for t in node.inputs if t.name and is_constant(t) is wanted] for wanted in (True, False))
    if not activations or len(node.outputs) > 1 or not all(id(t) in tokens for t in activations if t.name):
        return False
    if len({tokens[id(t)].shape[1] for t in activations if t.name}) > 1:
        return False
    if node.op == "MatMul":
        return is_constant(node.inputs[1]) and value(node.inputs[1]).ndim == 2
    if node.op in NORMS:
        return node.attrs.get("axis", -1) in (-1, 1)
    return node.op in ELEMENTWISE and all(value(t).ndim < 2 for t in constants)


def _move(graph: Graph, node: Node, tokens: dict[int, Tensor]) -> None:
    node.inputs = [tokens.get(id(t), t) for t in node.inputs]
    if node.op in NORMS:
        node.attrs["axis"] = -1
    result = node.outputs[0]
    first = next(t for t in node.inputs if not is_constant(t))
    width = value(node.inputs[1]).shape[1] if node.op == "MatMul" else result.shape[-1]
    flat = graph.insert("Reshape", [result, graph.constant(f"{node.name}/matrix", np.array([-1, width]))], name=f"{node.name}/rows")
    flat.dtype, flat.shape = result.dtype, [result.shape[0], width]
    result.shape = [*first.shape[:2], width]
    graph.replace(result, flat)
    tokens[id(flat)] = result


def _merge_reshapes(graph: Graph) -> None:
    """Reshape(Reshape(x)) -> Reshape(x), or x where it comes back to its shape."""
    for node in graph.clean().find("Reshape"):
        inner = producer(node.inputs[0])
        if inner is None or inner.op != "Reshape" or not is_constant(node.inputs[1]) or not value(node.inputs[1]).all():
            continue
        node.inputs[0] = inner.inputs[0]
        before, after = list(inner.inputs[0].shape or []), list(node.outputs[0].shape or [])
        if before and before[1:] == after[1:] and len(before) > 1 and not graph.is_output(node.outputs[0]):
            graph.replace(node.outputs[0], inner.inputs[0])
