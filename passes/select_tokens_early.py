"""Compute only the tokens that are read.

    f(x)[:, i]  ->  f(x[:, i])      for f a Linear, LayerNormalization, an elementwise operation, or attention (its queries)

A classifier that reads the class token alone leaves all other tokens of the last block's MLP, of its output projection
and of its queries unread; so does every selection of tokens by Gather or Slice. Exact, for float and integers alike.

Statistics stay those of all tokens: calibrate first, for a class token alone gives one row an image, too few for a range.

Precondition: everything that reads f(x) selects the same tokens, and a single one where it is open how many there are. A Linear
whose input others read too keeps it, so that one quantizer and one LayerNormalization serve them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention
from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, readers, value
from vitq_compiler.pipeline import Compilation, Fact, Pass

Tokens = tuple[int, ...]
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf"})


@dataclass(frozen=True)
class SelectTokensEarly(Pass):
    """f(x)[:, i] -> f(x[:, i])"""

    name = "select-tokens-early"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        linears = {id(linear.output): linear for linear in c.annotations.linears}
        paths = {id(path[-1]): path for attention in c.annotations.attentions if (path := _query_path(c, attention))}
        changes = 0
        while moved := sum(_move(c.graph, node, linears, paths) for node in reversed(c.graph.clean().nodes)):
            changes += moved
        if c.table is not None:  # a selection has the statistics of what it is selected from
            for node in c.graph.find("Gather"):
                if (seen := c.table.statistics.get(node.inputs[0].name)) is not None:
                    c.table.statistics.setdefault(node.outputs[0].name, seen)
        return changes


def _move(graph: Graph, node: Node, linears: dict[int, Linear], paths: dict[int, list[Node]]) -> int:
    """Select the inputs of ``node`` instead of its output, if that can be; returns 1 if so."""
    result = node.outputs[0] if len(node.outputs) == 1 else None
    if result is None or len(result.shape or ()) != 3 or not result.shape[1]:
        return 0
    tokens = _selected(graph, result)
    if tokens is None or len(tokens) == result.shape[1]:
        return 0
    linear, path = linears.get(id(result)), paths.get(id(node), [node])
    inputs = _linear_inputs(linear) if linear is not None else _inputs(graph, path, tokens)
    if inputs is None:
        return 0
    target = linear.matmul if linear is not None else path[0]
    if len(path) > 1:
        _shorten(graph, path, result.shape[1], len(tokens))
    for index, tensor in inputs.items():
        target.inputs[index] = tensor if is_constant(tensor) else _pick(graph, tensor, tokens)
    for shortened in {id(t): t for t in (target.outputs[0], result)}.values():
        shortened.shape = [shortened.shape[0], len(tokens), *shortened.shape[2:]]
    for reader in readers(result):
        if reader.op == "Gather" and value(reader.inputs[1]).ndim == 0:
            reader.inputs[1] = graph.constant(f"{reader.name}/first", np.array(0, np.int64))  # it still drops the axis
        else:
            graph.replace(reader.outputs[0], result)
    return 1


def _selected(graph: Graph, tensor: Tensor) -> Tokens | None:
    """The tokens that every reader of ``tensor`` selects, or None where they differ or one reads all."""
    if graph.is_output(tensor):
        return None
    chosen = {_tokens(reader, tensor) for reader in readers(tensor)}
    return chosen.pop() if len(chosen) == 1 else None


def _tokens(reader: Node, tensor: Tensor) -> Tokens | None:
    if reader.inputs[0] is not tensor or not all(is_constant(t) for t in reader.inputs[1:]):
        return None
    arguments = [value(t) for t in reader.inputs[1:]]
    if not isinstance(tensor.shape[1], int):  # how many there are is open
        one = reader.op == "Gather" and reader.attrs.get("axis", 0) == 1 and arguments[0].size == 1
        first = reader.op == "Slice" and [int(a[0]) for a in arguments if a.size == 1] in ([0, 1, 1], [0, 1, 1, 1])
        return (int(arguments[0].reshape(-1)[0]),) if (one and arguments[0].ndim <= 1) or first else None
    numbers = np.arange(tensor.shape[1])
    if reader.op == "Gather" and reader.attrs.get("axis", 0) == 1 and arguments[0].ndim <= 1:
        return tuple(numbers[arguments[0]].reshape(-1).tolist())
    if reader.op == "Slice" and len(arguments) >= 3 and arguments[2].tolist() == [1]:
        step = int(arguments[3][0]) if len(arguments) > 3 else 1
        return tuple(numbers[int(arguments[0][0]) : int(arguments[1][0]) : step].tolist()) if step > 0 else None
    return None


def _linear_inputs(linear: Linear) -> dict[int, Tensor] | None:
    return {0: linear.input} if len(linear.input.outputs) == 1 else None


def _query_path(c: Compilation, attention: Attention) -> list[Node]:
    """The nodes from the Linear of the queries to the merged heads, each read by the next one alone, as separate-heads writes them.

    Empty where they are others, where the products are to be quantized, whose statistics are of all queries, or masked.
    """
    tensor, path = attention.q.linear.output, list[Node]()
    ops = ["Reshape", "Transpose", "MatMul", "Softmax", "MatMul", "Transpose", "Reshape"]
    if attention.fused is not None or attention.mask is not None or any(edge in c.specs for edge in attention.edges.values()):
        return []
    for op in ops:
        following = readers(tensor)
        if len(following) != 1 or following[0].op != op or following[0].inputs[0] is not tensor or (path and c.graph.is_output(tensor)):
            return []
        path.append(following[0])
        tensor = path[-1].outputs[0]
    places = [node.attrs.get("perm") for node in (path[1], path[5])]
    views = [path[0], path[6]]
    mine = tensor is attention.proj.input and len(tensor.shape or ()) == len(attention.q.linear.output.shape or ()) == 3
    return path if mine and places == [[0, 2, 1, 3]] * 2 and all(is_constant(node.inputs[1]) for node in views) else []


def _shorten(graph: Graph, path: list[Node], before: int, after: int) -> None:
    """Let the nodes of `_query_path`, of ``before`` queries, have ``after`` of them."""
    for node, axis in zip(path, (1, 2, 2, 2, 2, 1, 1), strict=True):
        result = node.outputs[0]
        result.shape = [after if i == axis else size for i, size in enumerate(result.shape)]
        if node.op == "Reshape" and value(node.inputs[1])[1] == before:
            shape = value(node.inputs[1]).copy()
            shape[1] = after
            node.inputs[1] = graph.constant(f"{node.name}/fewer", shape)


def _inputs(graph: Graph, path: list[Node], tokens: Tokens) -> dict[int, Tensor] | None:
    """The inputs of a node, or of the first of several, that have a token axis, constants already selected; None where it stays."""
    if len(path) > 1:
        return {0: path[0].inputs[0]}
    (node,) = path
    shape = list(node.outputs[0].shape)
    if node.op == "LayerNormalization" and node.attrs.get("axis", -1) in (-1, 2):
        return {0: node.inputs[0]}
    plain = len(node.inputs) == 3 and not node.attrs.get("is_causal", 0)  # masks count queries
    if node.op == "Attention" and plain and len(node.inputs[0].shape or ()) == 3:
        return {0: node.inputs[0]}
    if node.op not in ELEMENTWISE:
        return None
    found = {}
    for index, tensor in enumerate(node.inputs):
        if not is_constant(tensor):
            if list(tensor.shape or [])[1:] != shape[1:] or producer(tensor) is None:
                return None
            found[index] = tensor
        elif value(tensor).ndim > 1 and value(tensor).shape[-2] != 1:
            found[index] = graph.constant(f"{tensor.name}/selected", value(tensor)[..., list(tokens), :])
    return found


def _pick(graph: Graph, tensor: Tensor, tokens: Tokens) -> Tensor:
    """``tensor[:, tokens]``; the same node for all who ask."""
    for reader in readers(tensor):
        if reader.op == "Gather" and _tokens(reader, tensor) == tokens and value(reader.inputs[1]).ndim == 1:
            return reader.outputs[0]
    index = graph.constant(f"{tensor.name}/tokens", np.array(tokens, np.int64))
    picked = graph.insert("Gather", [tensor, index], name=f"{tensor.name}/selected", like=tensor, axis=1)
    picked.shape = [tensor.shape[0], len(tokens), *tensor.shape[2:]]
    return picked
