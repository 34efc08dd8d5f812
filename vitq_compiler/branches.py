"""Control flow whose condition is a constant -> the nodes of the branch that is taken.

Exporters write If for ``if`` statements about shapes or options. Where the condition is an initializer or a Constant node,
seen through Identity, Not and Cast, the other branch can never run.
"""

from __future__ import annotations

from itertools import count

import onnx

from vitq_compiler.errors import ModelError
from vitq_compiler.tensors import to_array

ADVICE = {
    "If": "its condition is computed; export with fixed options and sizes, or with torch's dynamo exporter",
    "Loop": "the number of rounds is not part of the graph; unroll it, or export a traced model",
    "Scan": "the number of rounds is not part of the graph; unroll it, or export a traced model",
}


def inline_branches(graph: onnx.GraphProto) -> int:
    """Replace every If of a constant condition, in place, from the outside in; returns how many.

    Raises:
        ModelError: control flow is left; the message names the node and the reason.
    """
    numbers = count()
    inlined = 0
    while True:
        known = _constants(graph)
        place = next((i for i, n in enumerate(graph.node) if n.op_type == "If" and n.input[0] in known), None)
        if place is None:
            break
        _inline(graph, place, known[graph.node[place].input[0]], next(numbers))
        inlined += 1
    for node in graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            reason = ADVICE.get(node.op_type, "export a traced model")
            raise ModelError(f"control flow ({node.op_type} node {node.name or '?'}) is not supported: {reason}")
    return inlined


def _constants(graph: onnx.GraphProto) -> dict[str, bool]:
    """Truth of the single-element constants."""
    known = {t.name: bool(to_array(t).reshape(-1)[0]) for t in graph.initializer if _is_single(t)}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t") and _is_single(node.attribute[0].t):
            known[node.output[0]] = bool(to_array(node.attribute[0].t).reshape(-1)[0])
        elif node.op_type in ("Identity", "Not", "Cast") and node.input and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]] ^ (node.op_type == "Not")
    return known


def _is_single(tensor: onnx.TensorProto) -> bool:
    return all(d == 1 for d in tensor.dims) and tensor.data_type not in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED)


def _inline(graph: onnx.GraphProto, place: int, condition: bool, number: int) -> None:
    node = graph.node[place]
    wanted = "then_branch" if condition else "else_branch"
    branch = next(a.g for a in node.attribute if a.name == wanted)
    inner = {name: f"{name}/branch_{number}" for n in branch.node for name in n.output if name}
    inner |= {t.name: f"{t.name}/branch_{number}" for t in branch.initializer}
    renamed = onnx.GraphProto()
    renamed.CopyFrom(branch)
    _rename(renamed, inner)
    for n in renamed.node:
        n.name = f"{n.name or n.op_type}/branch_{number}"
    outputs = [
        onnx.helper.make_node("Identity", [inner.get(out.name, out.name)], [name], f"{name}/of_branch")
        for out, name in zip(branch.output, node.output, strict=True)
        if name
    ]
    nodes = [*graph.node[:place], *renamed.node, *outputs, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(renamed.initializer)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors in a graph and in the graphs inside it, where they are not names of their own."""
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                own = {name for n in attribute.g.node for name in n.output} | {t.name for t in attribute.g.initializer}
                _rename(attribute.g, {old: new for old, new in names.items() if old not in own})
