"""Shapes of token tensors whose sizes are known only when the graph runs: the leading sizes of a tensor, and others behind them."""

from __future__ import annotations

import numpy as np

from vitq_compiler.graph import Graph, Tensor, is_constant, producer, readers, value


def leading_sizes(graph: Graph, tensor: Tensor) -> Tensor:
    """The sizes of all axes of ``tensor`` but the last, as a vector; made once, and not of a Reshape that was given them."""
    node = producer(tensor)
    if node is not None and node.op == "Reshape" and (above := leading_of(node.inputs[1])) is not None:
        return above
    found = next((n for n in readers(tensor) if n.op == "Shape" and not n.attrs.get("start", 0) and n.attrs.get("end") == -1), None)
    return found.outputs[0] if found is not None else graph.add("Shape", [tensor], name=f"{tensor.name}/leading", start=0, end=-1)


def with_features(graph: Graph, leading: Tensor, *features: int) -> Tensor:
    """The shape of a tensor with these leading sizes and so many features, on one axis or several; made once."""
    for node in readers(leading):
        if leading_of(node.outputs[0]) is leading and value(node.inputs[1]).tolist() == list(features):
            return node.outputs[0]
    last = graph.constant(f"{leading.name}/features", np.array(features, np.int64))
    shape = graph.add("Concat", [leading, last], name=f"{leading.name}/shape", axis=0)
    shape.dtype = np.dtype(np.int64)
    return shape


def leading_of(shape: Tensor) -> Tensor | None:
    """The leading sizes that ``shape`` was made of by `with_features`."""
    node = producer(shape)
    if node is None or node.op != "Concat" or len(node.inputs) != 2 or not is_constant(node.inputs[1]):
        return None
    sizes = producer(node.inputs[0])
    return node.inputs[0] if sizes is not None and sizes.op == "Shape" and sizes.attrs.get("end") == -1 else None


def merge_shapes(graph: Graph) -> int:
    """One Shape for all tensors whose sizes have the same names; returns how many others there were."""
    first: dict[tuple[int | str, ...], Tensor] = {}
    changes = 0
    for node in list(graph.clean().nodes):
        sizes = tuple(node.inputs[0].shape or ())[node.attrs.get("start", 0) : node.attrs.get("end")] if node.op == "Shape" else ()
        if sizes and all(isinstance(size, int) or (size and not size.startswith("unk__")) for size in sizes):
            changes += graph.replace(node.outputs[0], first[sizes]) if sizes in first else 0
            first.setdefault(sizes, node.outputs[0])
    graph.clean()
    return changes
