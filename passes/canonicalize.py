"""Any exporter's graph -> the canonical graph: constants folded, shape arithmetic folded, no-ops gone, constants unshared.

Shapes are folded by observation, see `_fold_static`: the graph is run on a few probes, which differ in the sizes that its inputs leave
open. Where these are more than the batch, sizes inside the graph get names, the same where they are always equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, scalar, value
from vitq_compiler.passes._fold_static import fold_static
from vitq_compiler.passes._observed import name_sizes
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.probing import find_probes
from vitq_compiler.runtime import run, session


@dataclass(frozen=True)
class Canonicalize(Pass):
    """exporter's graph -> constants, static shapes, no no-ops, every constant with one reader"""

    name = "canonicalize"
    provides = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        graph = c.graph
        changes = fold_constant_nodes(graph)
        probes = c.probes or find_probes(graph, next(c.data.calibration()), partial(run, session(graph, threads=c.threads, brief=True)))
        folded, seen = fold_static(graph, probes, c.threads, lambda reason: self.note(c, "shapes", reason))
        graph.clean().infer_shapes()
        changes += folded + remove_no_ops(graph)
        changes += unshare_constants(graph)
        graph.clean().infer_shapes()
        if seen is not None:
            name_sizes(graph, seen)
        return changes


def fold_constant_nodes(graph: Graph) -> int:
    """Constant nodes -> initializers."""
    nodes = graph.find("Constant")
    for node in nodes:
        held = next(iter(node.attrs.values()))
        array = np.asarray(getattr(held, "values", held))
        if array.dtype == np.float64 and "value" not in node.attrs:
            array = array.astype(np.float32)  # value_float(s)
        graph.replace(node.outputs[0], graph.constant(f"{node.outputs[0].name}/value", array))
        graph.remove(node)
    return len(nodes)


def remove_no_ops(graph: Graph) -> int:
    """Identity, Dropout, Cast to the same type, Pad by nothing, x + 0, x * 1, Where of a constant choice and NaN guards."""
    changes = 0
    for node in list(graph.nodes):
        kept = _passed_through(node)
        if kept is not None and not (graph.is_output(node.outputs[0]) and (producer(kept) is None or graph.is_output(kept))):
            changes += graph.replace(node.outputs[0], kept)
            graph.remove(node)
    graph.clean()
    return changes


def _passed_through(node: Node) -> Tensor | None:
    first = node.inputs[0] if node.inputs else None
    if node.op in ("Identity", "Dropout"):
        return first
    if node.op == "Cast" and first is not None and first.dtype is not None and first.dtype == node.outputs[0].dtype:
        return first
    if node.op == "Pad" and len(node.inputs) > 1 and is_constant(node.inputs[1]) and not value(node.inputs[1]).any():
        return first
    if node.op in ("Add", "Mul"):
        neutral = 0.0 if node.op == "Add" else 1.0
        for number, other in (node.inputs, node.inputs[::-1]):
            if _uniform(number) == neutral and not is_constant(other) and _fits(number, other):
                return other
    if node.op == "Where" and (choice := _uniform(node.inputs[0])) is not None:
        kept = node.inputs[1] if choice else node.inputs[2]
        return kept if (kept.shape and kept.shape == node.outputs[0].shape) or is_constant(kept) else None
    if node.op == "Where" and (guard := producer(node.inputs[0])) is not None and guard.op == "IsNaN" and guard.inputs[0] is node.inputs[2]:
        softmax = producer(node.inputs[2])
        if softmax is not None and softmax.op == "Softmax" and scalar(node.inputs[1]) == 0.0:
            return node.inputs[2]
    return None


def _uniform(tensor: Tensor) -> float | None:
    """The number that all elements of a constant are, else None."""
    if not is_constant(tensor) or not value(tensor).size or (value(tensor) != value(tensor).flat[0]).any():
        return None
    return float(value(tensor).flat[0])


def _fits(constant: Tensor, other: Tensor) -> bool:
    """Whether an elementwise operation of both has the shape of ``other``."""
    sizes, shape = value(constant).shape, other.shape or ()
    return len(sizes) <= len(shape) and all(d in (1, size) for d, size in zip(sizes[::-1], shape[::-1], strict=False))


def unshare_constants(graph: Graph) -> int:
    """Give every reader of a float constant its own, so that a pass may change one without changing others."""
    changes, seen = 0, set()
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if is_constant(tensor) and value(tensor).dtype.kind == "f" and len(tensor.outputs) > 1:
                if id(tensor) in seen:
                    node.inputs[index] = graph.constant(f"{tensor.name}/copy", value(tensor))
                    changes += 1
                seen.add(id(tensor))
    return changes
