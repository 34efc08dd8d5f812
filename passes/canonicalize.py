"""Any exporter's graph -> the canonical graph: constants folded, shape arithmetic folded, no-ops gone, constants unshared.

Shapes are folded by observation. A tensor is *static* if it is computed from constants and from shapes of activations
alone, so it can depend on the input's sizes only. Where the batch is the one size left open, the graph is run with two
batch sizes: what did not change is a constant, what grew with the batch is written as a function of the batch.

Where more sizes are open, two image sizes are run. What did not change there may still change at a third (padding to whole
windows), so shape arithmetic is kept, but for Reshapes whose sizes are constants, those of their input, and one rest: these
are written 0 and -1. Scale factors, which are floats, are folded too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Array, Graph, Node, Tensor, is_constant, producer, readers, scalar, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.runtime import probe, probe_feed

BATCHES = (2, 3)
IMAGE_SIZES = ((64, 96), (224, 448))  # pairs to observe where height and width are open; the first that the model takes
RANDOM_OPS = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"})
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where", "And", "Or"})


@dataclass(frozen=True)
class Canonicalize(Pass):
    """exporter's graph -> constants, static shapes, no no-ops, every constant with one reader"""

    name = "canonicalize"
    provides = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        graph = c.graph
        changes = fold_constant_nodes(graph) + fold_static(graph, c.threads, lambda reason: self.note(c, "shapes", reason))
        graph.infer_shapes()
        changes += remove_no_ops(graph)
        changes += unshare_constants(graph)
        graph.clean().infer_shapes()
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


def fold_static(graph: Graph, threads: int, note: Callable[[str], None]) -> int:
    """Replace static tensors by constants or by functions of the batch; returns how many."""
    open_sizes = [d for spec in graph.inputs for d in spec.shape[spec.batched :] if not (isinstance(d, int) and d > 0)]
    static = _static_nodes(graph, through_shapes=not open_sizes)
    frontier = [
        t for n in graph.nodes if id(n) in static for t in n.outputs if graph.is_output(t) or any(id(r) not in static for r in readers(t))
    ]
    if open_sizes:
        note(f"input sizes {sorted(set(map(str, open_sizes)))} are dynamic, so shape arithmetic is kept")
        return fold_known(graph, frontier, threads) + fold_open_sizes(graph, threads, note)
    reshapes = {n.name: graph.insert("Shape", [n.outputs[0]], name=f"{n.name}/observed") for n in graph.find("Reshape")}
    if not frontier and not reshapes:
        return 0
    feeds = [probe_feed(graph.inputs, batch) for batch in BATCHES]
    try:
        small, large = probe(graph, [t.name for t in [*frontier, *reshapes.values()]], feeds, threads=threads)
    except TargetError as error:
        graph.clean()
        note(f"shape arithmetic is kept: {error}")
        return 0
    changes = sum(_fold_reshape(graph, graph.node(name), small[t.name], large[t.name]) for name, t in reshapes.items())
    batch: Tensor | None = None
    for tensor in frontier:
        first, second = small[tensor.name], large[tensor.name]
        if graph.is_output(tensor) and tensor.inputs[0].op == "Identity" and is_constant(tensor.inputs[0].inputs[0]):
            continue  # an output cannot be a constant itself
        if first.shape == second.shape and np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
            changes += graph.replace(tensor, graph.constant(f"{tensor.name}/folded", first))
            continue
        if not tensor.outputs and not graph.is_output(tensor):
            continue
        batch = batch if batch is not None else _batch_of(graph)
        changes += _fold_batched(graph, tensor, first, second, batch)
    return changes


def fold_known(graph: Graph, frontier: list[Tensor], threads: int) -> int:
    """Replace what is computed from constants alone."""
    frontier = [t for t in frontier if not graph.is_output(t)]
    if not frontier:
        return 0
    values = probe(graph, [t.name for t in frontier], [probe_feed(graph.inputs, 1, IMAGE_SIZES[0][0])], threads=threads)[0]
    return sum(graph.replace(t, graph.constant(f"{t.name}/folded", values[t.name])) for t in frontier)


def fold_open_sizes(graph: Graph, threads: int, note: Callable[[str], None]) -> int:
    """What two image sizes show of Reshapes and of scale factors; returns how many became constants."""
    static = _static_nodes(graph, through_shapes=True)
    factors = [
        t
        for n in graph.nodes
        if id(n) in static
        for t in n.outputs
        if t.dtype == np.float32 and any(id(r) not in static for r in readers(t))
    ]
    nodes = graph.find("Reshape")
    shapes = {t.name: graph.insert("Shape", [t], name=f"{t.name}/observed").name for n in nodes for t in (n.inputs[0], n.outputs[0])}
    names = [*shapes.values(), *(t.name for t in factors)]
    seen: list[dict[str, Array]] = []
    for sizes in IMAGE_SIZES:
        try:
            feeds = [probe_feed(graph.inputs, batch, size) for batch, size in zip(BATCHES, sizes, strict=True)]
            seen = [probe(graph, names, [feed], threads=threads)[0] for feed in feeds]
            break
        except TargetError as error:
            told = str(error)
    graph.clean()
    if not seen:
        note(f"image sizes {IMAGE_SIZES} do not run, so Reshapes are kept as they are: {told}")
        return 0
    first, second = seen
    changes = 0
    for node in nodes:
        before, after = (shapes[t.name] for t in (node.inputs[0], node.outputs[0]))
        changes += _fold_open_reshape(graph, node, (first[before], second[before]), (first[after], second[after]))
    for tensor in factors:
        a, b = first[tensor.name], second[tensor.name]
        if a.size == 1 and np.array_equal(a, b):
            changes += graph.replace(tensor, graph.constant(f"{tensor.name}/folded", a))
    return changes


def _fold_open_reshape(graph: Graph, node: Node, before: tuple[Array, Array], after: tuple[Array, Array]) -> int:
    """A Reshape by what it keeps: sizes that are constants, sizes of its input (0), and one that follows from the others (-1)."""
    first, second = after
    target = np.where(first == second, first, -1).astype(np.int64)
    for axis in range(min(len(first), len(before[0]))):
        if target[axis] == -1 and all(a[axis] == b[axis] for a, b in zip(after, before, strict=True)):
            target[axis] = 0
    if (target == -1).sum() > 1 or (is_constant(node.inputs[1]) and np.array_equal(value(node.inputs[1]), target)):
        return 0
    node.inputs[1] = graph.constant(f"{node.name}/target", target)
    node.attrs.pop("allowzero", None)
    return 1


def _static_nodes(graph: Graph, *, through_shapes: bool) -> set[int]:
    static: set[int] = set()
    for node in graph.clean().nodes:
        if node.op in RANDOM_OPS or not node.outputs:
            continue
        known = all(is_constant(t) or not t.name or (producer(t) is not None and id(producer(t)) in static) for t in node.inputs)
        if known or (through_shapes and node.op in ("Shape", "Size")):
            static.add(id(node))
    return static


def _fold_reshape(graph: Graph, node: Node, first: Array, second: Array) -> int:
    """A Reshape to its observed output shape; the one size that may depend on the batch becomes -1."""
    if (first != second).sum() > 1 or (first < 1).any():
        return 0
    target = np.where(first != second, -1, first).astype(np.int64)
    if is_constant(node.inputs[1]) and np.array_equal(value(node.inputs[1]), target):
        return 0
    node.inputs[1] = graph.constant(f"{node.name}/target", target)
    node.attrs.pop("allowzero", None)
    return 1


def _batch_of(graph: Graph) -> Tensor:
    spec = next(s for s in graph.inputs if s.shape and not (isinstance(s.shape[0], int) and s.shape[0] > 0))
    image = graph.tensor(spec.name)
    for node in readers(image):  # of an earlier run
        if node.op == "Shape" and (node.attrs.get("start", 0), node.attrs.get("end")) == (0, 1):
            return node.outputs[0]
    batch = graph.insert("Shape", [image], name="batch", start=0, end=1)
    batch.dtype, batch.shape = np.dtype(np.int64), [1]
    return batch


def _fold_batched(graph: Graph, tensor: Tensor, first: Array, second: Array, batch: Tensor) -> int:
    """A shape vector whose changed entries are the batch, or rows repeated along the batch."""
    node = tensor.inputs[0]
    shape = producer(node.inputs[1]) if node.op == "Expand" and is_constant(node.inputs[0]) else node
    done = shape is not None and shape.op == "Concat" and all(t is batch or is_constant(t) for t in shape.inputs)
    if first.ndim == 1 and first.dtype == np.int64 and first.shape == second.shape:
        changed = first != second
        if not done and (first[changed] == BATCHES[0]).all() and (second[changed] == BATCHES[1]).all():
            parts = [batch if c else graph.constant(f"{tensor.name}/size", np.array([v])) for v, c in zip(first, changed, strict=True)]
            return graph.replace(tensor, graph.insert("Concat", parts, name=f"{tensor.name}/batched", like=tensor, axis=0))
        return 0
    same_row = first.ndim > 0 and first.shape[1:] == second.shape[1:] and (len(first), len(second)) == BATCHES
    if not same_row or not all((a == first[0]).all() for a in (first, second)):
        return 0
    row = first[:1]
    if (row == row.flat[0]).all() and all(r.op in ELEMENTWISE for r in readers(tensor)):
        return graph.replace(tensor, graph.constant(f"{tensor.name}/uniform", row))
    if done:
        return 0
    ones = graph.constant(f"{tensor.name}/ones", np.ones(first.ndim - 1, np.int64))
    shape = graph.add("Concat", [batch, ones], name=f"{tensor.name}/batched_shape", axis=0)
    return graph.replace(
        tensor, graph.insert("Expand", [graph.constant(f"{tensor.name}/row", row), shape], name=f"{tensor.name}/batched", like=tensor)
    )


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
