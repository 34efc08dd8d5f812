"""Tokens as rows: what works row by row runs on [-1, features], so that the Reshapes between Gemms cancel.

    Reshape[B, T, C](x) -> f -> Reshape[-1, C]   ->   f(x)      for f elementwise or LayerNormalization over C

    Reshape[C](Reshape[B](x))   ->   Reshape[C](x)

A Reshape copies nothing, but each costs the runtime a few microseconds, and a block has ten.
"""

from __future__ import annotations

import numpy as np

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, value
from vitq_compiler.targets._leading import leading_of, leading_sizes, with_features

ROWWISE = frozenset({"Gelu", "Relu", "Sigmoid", "LayerNormalization", "Add", "Sum", "Mul", "MatMul", "Div", "Erf", "Tanh"})


def flatten_stream(graph: Graph) -> int:
    """Move Reshapes behind row-wise operations until they meet and cancel; returns the number of operations moved."""
    rows: dict[int, Tensor] = {}  # id of a tensor [..., C] -> the same numbers as [-1, C]
    changes = 0
    for node in list(graph.clean().nodes):
        if node.op == "Reshape":
            _meet(graph, node, rows)
        elif node.op in ROWWISE and _is_rowwise(node, rows):
            _move(graph, node, rows)
            changes += 1
    graph.clean()
    return changes


def merge_reshapes(graph: Graph) -> int:
    """One Reshape where two follow each other; sizes that the second copies are those that the first was given."""
    changes = 0
    for node in graph.find("Reshape"):
        first = producer(node.inputs[0])
        if first is None or first.op != "Reshape" or not is_constant(node.inputs[1]):
            continue
        sizes = value(node.inputs[1]).tolist()
        if 0 in sizes:
            leading, copied = leading_of(first.inputs[1]), len(first.outputs[0].shape or ()) - 1
            if leading is None or copied < 1 or any(sizes[:copied]) or 0 in sizes[copied:]:
                continue
            node.inputs[1] = with_features(graph, leading, *sizes[copied:])
        node.inputs[0] = first.inputs[0]
        changes += 1
    graph.clean()
    return changes


def _meet(graph: Graph, node: Node, rows: dict[int, Tensor]) -> None:
    source, result = node.inputs[0], node.outputs[0]
    shape, target = list(source.shape or []), list(result.shape or [])
    if is_constant(node.inputs[1]):
        target = [int(d) for d in value(node.inputs[1])]
    if len(shape) == 2 and len(target) > 2 and isinstance(shape[-1], int) and target[-1] == shape[-1]:
        rows[id(result)] = source
    elif len(target) == 2 and target[0] == -1 and id(source) in rows and target[1] == shape[-1]:
        graph.replace(result, rows[id(source)])


def _is_rowwise(node: Node, rows: dict[int, Tensor]) -> bool:
    shape = list(node.outputs[0].shape or [])
    activations = [t for t in node.inputs if not is_constant(t)]
    if len(node.outputs) > 1 or len(shape) < 3 or not isinstance(shape[-1], int) or not all(shape[1:]):
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
    """Whether nothing is broadcast between the two; a dynamic first axis is the batch whatever its name, others go by theirs."""
    batches = [d if isinstance(d, int) else None for d in (*shape[:1], *other[:1])]
    return shape[1:] == other[1:] and len(set(batches)) == 1


def _move(graph: Graph, node: Node, rows: dict[int, Tensor]) -> None:
    result = node.outputs[0]
    shape = list(result.shape)
    tokens = next(t for t in node.inputs if not is_constant(t))
    for index, tensor in enumerate(node.inputs):
        if not is_constant(tensor):
            if id(tensor) not in rows:
                matrix = graph.constant(f"{tensor.name}/rows", np.array([-1, tensor.shape[-1]], np.int64))
                rows[id(tensor)] = graph.insert("Reshape", [tensor, matrix], name=f"{tensor.name}/rows", like=tensor)
                rows[id(tensor)].shape = [None, tensor.shape[-1]]
            node.inputs[index] = rows[id(tensor)]
    if all(isinstance(size, int) for size in shape[1:]):
        target = graph.constant(f"{node.name}/tokens", np.array([-1, *shape[1:]], np.int64))
    else:
        target = with_features(graph, leading_sizes(graph, tokens), shape[-1])
    tokens = graph.insert("Reshape", [result, target], name=f"{node.name}/tokens", like=result)
    graph.replace(result, tokens)
    result.shape = [None, shape[-1]]
    if node.op == "LayerNormalization":
        node.attrs["axis"] = -1
    rows[id(tokens)] = result
