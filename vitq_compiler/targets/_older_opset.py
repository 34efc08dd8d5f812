"""A graph in the words of an older opset, for a compiler that ends there.

    Gelu(x)             ->  x * 0.5 * (1 + erf(x / sqrt 2)), or its tanh form     before opset 20
    Reduce*(x, axes)    ->  Reduce*<axes>(x)                                      before opset 18

Every other operator must be there with the same inputs and attributes, else the graph is refused.
"""

from __future__ import annotations

from math import pi, sqrt

import numpy as np
import onnx

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, value

GELU, AXES_AS_INPUT = 20, 18  # the opsets that brought them
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare")


def lower_opset(graph: Graph, opset: int) -> int:
    """Rewrite what came after ``opset``; returns the number of changes.

    Raises:
        TargetError: an operator has no form there.
    """
    if graph.opset <= opset:
        return 0
    changes = 0
    for node in graph.find("Gelu") if opset < GELU else ():
        graph.replace(node.outputs[0], _gelu(graph, node))
        changes += 1
    for node in graph.find(*REDUCTIONS) if opset < AXES_AS_INPUT else ():
        if len(node.inputs) > 1:
            if not is_constant(node.inputs[1]):
                raise TargetError(f"{node.op} node {node.name}: its axes are computed, which opset {opset} cannot say; use a later version")
            node.attrs["axes"] = value(node.inputs[1]).tolist()
            del node.inputs[1]
            changes += 1
    for node in graph.find("Split") if opset < AXES_AS_INPUT else ():
        changes += node.attrs.pop("num_outputs", None) is not None
    for node in graph.clean().nodes:
        _check(node, opset)
    graph.opset = opset
    return changes


def _check(node: Node, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    except onnx.defs.SchemaError:
        raise TargetError(f"{node.op} node {node.name}: opset {opset} has no such operator; use a later version") from None
    unknown = [
        *(name for name in node.attrs if name not in schema.attributes),
        *(["inputs"] if len(node.inputs) > schema.max_input else []),
    ]
    if unknown:
        raise TargetError(f"{node.op} node {node.name}: opset {opset} does not know its {unknown[0]}; use a later version")


def _gelu(graph: Graph, node: Node) -> Tensor:
    x, name = node.inputs[0], node.name

    def number(of: float) -> Tensor:
        return graph.constant(f"{name}/number", np.asarray(of, x.dtype or np.float32))

    def insert(op: str, *inputs: Tensor) -> Tensor:
        return graph.insert(op, inputs, name=f"{name}/{op.lower()}", like=node.outputs[0])

    if node.attrs.get("approximate", "none") == "tanh":
        cube = insert("Mul", insert("Mul", insert("Mul", x, x), x), number(0.044715))
        gate = insert("Tanh", insert("Mul", insert("Add", x, cube), number(sqrt(2 / pi))))
    else:
        gate = insert("Erf", insert("Div", x, number(sqrt(2))))
    return insert("Mul", insert("Mul", x, insert("Add", gate, number(1.0))), number(0.5))
