"""Outputs whose entries come in an order that scores decide.

Detectors sort by score: TopK or NonMaxSuppression picks boxes, or queries for a decoder. Entries of nearly the same score change places
when anything is rounded, and a comparison entry by entry then compares unlike ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, readers, scalar

SORTING = frozenset({"TopK", "NonMaxSuppression"})
SELECTING = frozenset({"Gather", "GatherElements", "GatherND"})
WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "QLinearMatMul", "QLinearConv"})


def sorted_outputs(graph: Graph) -> dict[str, str]:
    """Outputs in the order of scores -> the node that sorts.

    These are what a sorting node gives, with no weights between, and what is computed of entries selected in its order, as long as
    there is an axis along which the entries can lie.
    """
    found: dict[str, str] = {}
    for node in graph.find(*SORTING):
        plain = _behind(node.outputs, lambda reader: reader.op not in WEIGHTED)
        count = scalar(node.inputs[1]) if node.op == "TopK" else None
        ordered = [t for t in graph.outputs if id(t) in plain and _may_hold(t, count)]
        if count is not None and count > 1:
            selected = [t for n in graph.find(*SELECTING) if not is_constant(n.inputs[0]) and id(n.inputs[1]) in plain for t in n.outputs]
            behind = _behind(selected, lambda _: True)
            ordered += [t for t in graph.outputs if id(t) in behind and count in (t.shape or ())[1:-1]]
        found.update({t.name: node.name for t in ordered if t.name not in found})
    return found


def _may_hold(tensor: Tensor, count: float | None) -> bool:
    """Whether so many entries may lie along an axis of ``tensor``."""
    sizes = list(tensor.shape or [])
    return count is None or not sizes or any(size == count or not isinstance(size, int) for size in sizes[1:] or sizes)


def _behind(tensors: Iterable[Tensor], through: Callable[[Node], bool]) -> set[int]:
    """``tensors`` and what is computed from them by nodes for which ``through`` holds, by id."""
    stack = list(tensors)
    seen = {id(t) for t in stack}
    while stack:
        for node in readers(stack.pop()):
            if through(node):
                stack += [t for t in node.outputs if id(t) not in seen]
                seen |= {id(t) for t in node.outputs}
    return seen
