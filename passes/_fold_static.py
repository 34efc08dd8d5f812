"""Static tensors -> constants, or functions of the sizes that the inputs leave open, by observation.

    t                                ->  constant                           where it was the same in every run
    [B, 3, H]                        ->  Concat(batch, 3, height)           a vector of sizes of the inputs and of constants
    row repeated B times             ->  Expand(row, [B, 1, ..])            or the row, where the other operand has the whole shape
    Reshape(x, computed)             ->  Reshape(x, [0, 197, -1])           sizes that are constants, those of x, and one rest
    Reshape(Transpose(Reshape(x)))   ->  Transpose(x)                       where it is that in every run
    Expand(x, computed), Reshape     ->  x                                  where its shape stays in every run

A tensor is *static* if it is computed from constants and from shapes of activations alone, so it can depend on the inputs' sizes
only; see `sizes` for why that shows in a few runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Array, Graph, Node, Tensor, is_constant, producer, readers, value
from vitq_compiler.passes._observed import Observed, Symbols, observe
from vitq_compiler.sizes import Axis, Probe, open_axes
from vitq_compiler.statics import static_nodes

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where", "And", "Or"})
LAYOUT = frozenset({"Reshape", "Transpose"})


def fold_static(graph: Graph, probes: Sequence[Probe], threads: int, note: Callable[[str], None]) -> tuple[int, Observed | None]:
    """Fold what the probes show; returns how many changes, and what was seen of a graph that leaves more open than its batch."""
    static = static_nodes(graph, through_shapes=True)
    frontier = [
        t for n in graph.nodes if id(n) in static for t in n.outputs if graph.is_output(t) or any(id(r) not in static for r in readers(t))
    ]
    if groups := open_axes(graph.inputs):
        note(_told(groups, probes))
    reshapes = graph.find("Reshape")
    shown = [n for n in graph.nodes if n.op == "Reshape" or (groups and id(n) not in static)]
    shaped = [t for n in shown for t in (*n.inputs, *n.outputs) if t.name and not is_constant(t)]
    try:
        seen = observe(graph, probes, frontier, shaped, threads)
    except TargetError as error:
        note(f"shape arithmetic is kept: {error}")
        return 0, None
    changes = sum(_fold_reshape(graph, node, seen) for node in reshapes)
    symbols = _Makers(graph, Symbols(graph, seen))
    changes += sum(_fold_tensor(graph, tensor, seen, symbols) for tensor in frontier)
    changes += sum(_fold_chain(graph, node, seen) + _drop_unchanged(graph, node, seen) for node in reversed(graph.clean().nodes))
    return changes, seen if groups else None


def _told(groups: Sequence[Sequence[Axis]], probes: Sequence[Probe]) -> str:
    """What is done about axes other than the batch."""
    names = ", ".join(f"{name}[{axis}]" for group in groups for name, axis in group)
    if any(probe.shapes != probes[0].shapes for probe in probes):
        return f"sizes {names} are open: what depends on them is computed when the graph runs"
    shapes = ", ".join(f"{name}[{', '.join(str(d or 'N') for d in shape)}]" for name, shape in probes[0].shapes.items())
    return f"sizes {names} are open, but no others than {shapes} run, nor do they in the result"


class _Makers:
    """The tensors that hold the sizes of input axes, each made once."""

    def __init__(self, graph: Graph, symbols: Symbols) -> None:
        self._graph, self.axes = graph, symbols.axes

    def __getitem__(self, series: tuple[int, ...]) -> Tensor:
        """A tensor [1] that has these values in the runs."""
        name, axis = self.axes[series]
        source = self._graph.tensor(name)
        for node in readers(source):  # of an earlier run
            if node.op == "Shape" and (node.attrs.get("start", 0), node.attrs.get("end")) == (axis, axis + 1):
                return node.outputs[0]
        size = self._graph.insert("Shape", [source], name="batch" if axis == 0 else f"{name}/size_{axis}", start=axis, end=axis + 1)
        size.dtype, size.shape = np.dtype(np.int64), [1]
        return size

    def made(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is one of these."""
        node = producer(tensor)
        return node is not None and node.op == "Shape" and node.attrs.get("end") == node.attrs.get("start", 0) + 1


def _fold_tensor(graph: Graph, tensor: Tensor, seen: Observed, sizes: _Makers) -> int:
    """One static tensor that others read."""
    values = seen.values[tensor.name]
    first = values[0]
    if graph.is_output(tensor) and tensor.inputs[0].op == "Identity" and is_constant(tensor.inputs[0].inputs[0]):
        return 0  # an output cannot be a constant itself
    if all(first.shape == v.shape and np.array_equal(first, v, equal_nan=first.dtype.kind == "f") for v in values[1:]):
        if not (seen.certain or (first.size == 1 and first.dtype.kind == "f") or _is_known(producer(tensor))):
            return 0
        return graph.replace(tensor, graph.constant(f"{tensor.name}/folded", first))
    if not tensor.outputs and not graph.is_output(tensor):
        return 0
    return _fold_sized(graph, tensor, values, seen, sizes)


def _is_known(node: Node | None) -> bool:
    """Whether a node computes from constants alone."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None or node.op in ("Shape", "Size"):
            return False
        stack.extend(producer(t) for t in node.inputs if t.name and not is_constant(t))
    return True


def _fold_sized(graph: Graph, tensor: Tensor, values: list[Array], seen: Observed, sizes: _Makers) -> int:
    """A vector of sizes and constants, or what is repeated along axes that are open."""
    first = values[0]
    node = tensor.inputs[0]
    shape = producer(node.inputs[1]) if node.op == "Expand" and is_constant(node.inputs[0]) else node
    done = shape is not None and shape.op == "Concat" and all(is_constant(t) or sizes.made(t) for t in shape.inputs)
    if first.ndim == 1 and first.dtype == np.int64 and len({v.shape for v in values}) == 1:
        entries = [tuple(int(v[i]) for v in values) for i in range(len(first))]
        if done or not all(len(set(entry)) == 1 or entry in sizes.axes for entry in entries):
            return 0
        parts = [graph.constant(f"{tensor.name}/size", np.array([entry[0]])) if len(set(entry)) == 1 else sizes[entry] for entry in entries]
        return graph.replace(tensor, graph.insert("Concat", parts, name=f"{tensor.name}/sized", like=tensor, axis=0))
    if not first.size or len({v.ndim for v in values}) != 1 or first.ndim == 0:
        return 0
    spread = [axis for axis, series in enumerate(zip(*(v.shape for v in values), strict=True)) if len(set(series)) > 1]
    same = first[tuple(slice(1) if axis in spread else slice(None) for axis in range(first.ndim))]
    repeated = all(np.array_equal(v, np.broadcast_to(same, v.shape)) for v in values)
    batched = tuple(map(len, values)) == seen.batches and spread == [0]
    number = batched and (same == same.flat[0]).all() and _is_elementwise(graph, tensor)
    if repeated and (number or _is_spread(graph, tensor, seen)):
        return graph.replace(tensor, graph.constant(f"{tensor.name}/row", same))
    if not (batched and repeated) or done or seen.batches not in sizes.axes:
        return 0
    ones = graph.constant(f"{tensor.name}/ones", np.ones(first.ndim - 1, np.int64))
    target = graph.add("Concat", [sizes[seen.batches], ones], name=f"{tensor.name}/batched_shape", axis=0)
    return graph.replace(
        tensor, graph.insert("Expand", [graph.constant(f"{tensor.name}/row", same), target], name=f"{tensor.name}/batched", like=tensor)
    )


def _is_elementwise(graph: Graph, tensor: Tensor) -> bool:
    """Whether ``tensor`` is read element by element, and by nothing else."""
    return not graph.is_output(tensor) and all(reader.op in ELEMENTWISE for reader in readers(tensor))


def _is_spread(graph: Graph, tensor: Tensor, seen: Observed) -> bool:
    """Whether whatever reads ``tensor`` reads, element by element, another tensor that has the shape of the result by itself."""
    for reader in readers(tensor):
        shapes = seen.shapes.get(reader.outputs[0].name)
        if not shapes or not any(seen.shapes.get(t.name) == shapes for t in reader.inputs if t is not tensor):
            return False
    return _is_elementwise(graph, tensor)


# Reshapes


def _fold_reshape(graph: Graph, node: Node, seen: Observed) -> int:
    """A Reshape by what it keeps: sizes that are constants, those of its input (0), and one that follows from the others (-1)."""
    after, before = seen.shapes[node.outputs[0].name], seen.shapes.get(node.inputs[0].name)
    if len({len(shape) for shape in after}) > 1 or any(0 in shape for shape in after):
        return 0
    columns = list(zip(*after, strict=True))
    target = [column[0] if len(set(column)) == 1 else -1 for column in columns]
    if target.count(-1) > 1 and before is not None:
        kept = list(zip(*before, strict=True))
        target = [0 if d == -1 and axis < len(kept) and kept[axis] == columns[axis] else d for axis, d in enumerate(target)]
    if target.count(-1) > 1 or (is_constant(node.inputs[1]) and np.array_equal(value(node.inputs[1]), target)):
        return 0
    node.inputs[1] = graph.constant(f"{node.name}/target", np.array(target, np.int64))
    node.attrs.pop("allowzero", None)
    return 1


def _fold_chain(graph: Graph, node: Node, seen: Observed) -> int:
    """A Reshape to a computed size and what follows it, Reshapes and Transposes up to ``node``, where all of it is one Transpose."""
    if node.op not in LAYOUT or any(reader.op in LAYOUT for reader in readers(node.outputs[0])):
        return 0
    chain: list[Node] = []
    above: Node | None = node
    while above is not None and above.op in LAYOUT and above.inputs[0].name in seen.shapes:
        chain.insert(0, above)
        above = producer(above.inputs[0])
    first = next((i for i, n in enumerate(chain) if n.op == "Reshape" and not is_constant(n.inputs[1])), None)
    if first is None or node.outputs[0].name not in seen.shapes:
        return 0
    source, result = chain[first].inputs[0], node.outputs[0]
    runs = [_pushed(chain[first:], seen, source, run) for run in range(len(seen.probes))]
    ranks = {x.ndim for pair in runs for x in pair}
    for order in permutations(range(ranks.pop())) if len(ranks) == 1 else ():
        if all(np.array_equal(before.transpose(order), after) for before, after in runs):
            moved = graph.insert("Transpose", [source], name=f"{node.name}/transposed", like=result, perm=list(order))
            return graph.replace(result, moved)
    return 0


def _pushed(chain: list[Node], seen: Observed, source: Tensor, run: int) -> tuple[Array, Array]:
    """Numbers for the elements of ``source`` in one run, as they are there and at the end of the chain."""
    shape = seen.shapes[source.name][run]
    before = after = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    for node in chain:
        if node.op == "Transpose":
            after = after.transpose(node.attrs.get("perm", range(after.ndim)[::-1]))
        else:
            after = after.reshape(seen.shapes[node.outputs[0].name][run])
    return before, after


def _drop_unchanged(graph: Graph, node: Node, seen: Observed) -> int:
    """An Expand or Reshape that left the shape of its input as it was in every run."""
    if node.op not in ("Expand", "Reshape") or graph.is_output(node.outputs[0]):
        return 0
    before, after = (seen.shapes.get(t.name) for t in (node.inputs[0], node.outputs[0]))
    return graph.replace(node.outputs[0], node.inputs[0]) if seen.certain and before is not None and before == after else 0
