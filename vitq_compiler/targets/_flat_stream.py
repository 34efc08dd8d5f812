"""Tokens as rows: what works row by row runs on [-1, features], so that the Reshapes between Gemms cancel.

    Reshape[B, T, C](x) -> f -> Reshape[-1, C]   ->   f(x)      for f elementwise or LayerNormalization over C

    Reshape[C](Reshape[B](x))   ->   Reshape[C](x)

A Reshape copies nothing, but each costs the runtime a few microseconds, and a block has ten.
"""

from __future__ import annotations

import numpy as np

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, value

ROWWISE = frozenset({"Gelu", "Relu", "Sigmoid", "LayerNormalization", "Add", "Sum", "Mul", "MatMul", "Div", "Erf", "Tanh"})


def flatten_stream(graph: Graph) -> int:
    """Move Reshapes behind row-wise operations until they meet and cancel; returns the number of operations moved."""
    rows: dict[int, Tensor] = {}  # id of a tensor [..., C] -> the same numbers as [-1, C]
    changes = 0
    for node in list(graph.clean().nodes):
        if node.op == "Reshape" and is_constant(node.inputs[1]):
            _meet(graph, node, rows)
        elif node.op in ROWWISE and _is_rowwise(node, rows):
            _move(graph, node, rows)
            changes += 1
    graph.clean()
    return changes


def merge_reshapes(graph: Graph) -> int:
    """One Reshape where two follow each other, unless the second copies a size from the first."""
    changes = 0
    for node in graph.find("Reshape"):
        first = producer(node.inputs[0])
        if first is not None and first.op == "Reshape" and is_constant(node.inputs[1]) and (value(node.inputs[1]) != 0).all():
            node.inputs[0] = first.inputs[0]
            changes += 1
    graph.clean()
    return changes


def _meet(graph: Graph, node: Node, rows: dict[int, Tensor]) -> None:
    source, result = node.inputs[0], node.outputs[0]
    target = [int(d) for d in value(node.inputs[1])]
    shape = list(source.shape or [])
    if len(shape) == 2 and len(target) > 2 and target[-1] == shape[-1]:
        rows[id(result)] = source
    elif len(target) == 2 and target[0] == -1 and id(source) in rows and target[1] == shape[-1]:
        graph.replace(result, rows[id(source)])


def _is_rowwise(node: Node, rows: dict[int, Tensor]) -> bool:
    shape = list(node.outputs[0].shape or [])
    activations = [t for t in node.inputs if not is_constant(t)]
    if len(node.outputs) > 1 or len(shape) < 3 or not all(isinstance(d, int) for d in shape[1:]):
        return False
    if not any(id(t) in rows for t in activations):
        return False
    if node.op == "LayerNormalization" and node.attrs.get("axis", -1) not in (-1, len(shape) - 1):
        return False
    if node.op == "MatMul":  # the features change, the rows do not
        return is_constant(node.inputs[1]) and value(node.inputs[1]).ndim == 2 and _aligned(list(node.inputs[0].shape)[:-1], shape[:-1])
    if any(value(t).ndim > (1 if value(t).size > 1 else 2) for t in node.inputs if is_constant(t)):
        return False
    return all(_aligned(list(t.shape or []), shape) for t in activations)


def _aligned(shape: list[int | str | None], other: list[int | str | None]) -> bool:
    """Whether nothing is broadcast between the two; a dynamic first axis is the batch whatever its name."""
    batches = [d if isinstance(d, int) else None for d in (*shape[:1], *other[:1])]
    return shape[1:] == other[1:] and len(set(batches)) == 1


def _move(graph: Graph, node: Node, rows: dict[int, Tensor]) -> None:
    result = node.outputs[0]
    shape = list(result.shape)
    for index, tensor in enumerate(node.inputs):
        if not is_constant(tensor):
            if id(tensor) not in rows:
                matrix = graph.constant(f"{tensor.name}/rows", np.array([-1, tensor.shape[-1]], np.int64))
                rows[id(tensor)] = graph.insert("Reshape", [tensor, matrix], name=f"{tensor.name}/rows", like=tensor)
                rows[id(tensor)].shape = [None, tensor.shape[-1]]
            node.inputs[index] = rows[id(tensor)]
    target = graph.constant(f"{node.name}/tokens", np.array([-1, *shape[1:]], np.int64))
    tokens = graph.insert("Reshape", [result, target], name=f"{node.name}/tokens", like=result)
    graph.replace(result, tokens)
    result.shape = [None, shape[-1]]
    if node.op == "LayerNormalization":
        node.attrs["axis"] = -1
    rows[id(tokens)] = result
