"""Integer inputs: which numbers a model takes there, read from the graph, so that samples can be made up without knowing the model.

ids -> Gather(table[N, C], ids)      ids pick rows of tables: 0 to N - 1
mask -> anything else                a mask or the like: ones, so that everything is attended to
"""

from __future__ import annotations

from vitq_compiler.graph import Graph, Tensor, is_constant, readers, value
from vitq_compiler.views import VIEWS

MASK = 0
MOVES = VIEWS | {"Cast", "Expand"}


def id_limits(graph: Graph) -> dict[str, int]:
    """Integer input -> the number of rows of the smallest table that it picks rows from, or `MASK` where it picks none."""
    limits = {}
    for spec in graph.inputs:
        if spec.dtype.kind in "iub" and len(spec.shape) < 3:
            sizes = _table_sizes(graph.tensor(spec.name))
            limits[spec.name] = min(sizes) if sizes else MASK
    return limits


def _table_sizes(tensor: Tensor) -> list[int]:
    sizes: list[int] = []
    stack, seen = [tensor], {id(tensor)}
    while stack:
        current = stack.pop()
        for node in readers(current):
            if node.op == "Gather" and node.inputs[1] is current:
                table, axis = node.inputs[0], node.attrs.get("axis", 0)
                sizes += [value(table).shape[axis]] if is_constant(table) and value(table).ndim > 1 else []
            elif node.op in MOVES and node.inputs[0] is current:
                stack += [t for t in node.outputs if id(t) not in seen]
                seen |= {id(t) for t in node.outputs}
    return sizes
