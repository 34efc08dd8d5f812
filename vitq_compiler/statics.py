"""Static tensors: those that are computed from constants, and from shapes of activations, alone."""

from __future__ import annotations

from vitq_compiler.graph import Graph, is_constant, producer

RANDOM_OPS = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"})


def static_nodes(graph: Graph, *, through_shapes: bool) -> set[int]:
    """Ids of the nodes whose outputs are static; ``through_shapes`` counts what depends on the inputs' sizes."""
    static: set[int] = set()
    for node in graph.clean().nodes:
        if node.op in RANDOM_OPS or not node.outputs:
            continue
        known = all(is_constant(t) or not t.name or (producer(t) is not None and id(producer(t)) in static) for t in node.inputs)
        if known or (through_shapes and node.op in ("Shape", "Size")):
            static.add(id(node))
    return static
