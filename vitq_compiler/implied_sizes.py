"""What a graph says of the sizes that its inputs leave open.

    image -> Conv(weight[D, C, p, p])                 its channels are C, and a patch has p pixels to a side
    patches[B, N, D] + table[1, k + g g, D]           g patches to a side, behind k other tokens
    image[B, D, g, g] + table[1, D, g, g]             the same, and so [1, g, g, D]
    patches + Resize(table[1, D, g, g])               trained with g patches to a side; other numbers will do
    words[B, N, D] + table[N, D][positions]           no more than N words

A table of positions is a static tensor (see `statics`) that is added to an activation, or a constant that this one is made of. None
of it is certain: who uses it tries it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isqrt, prod

from vitq_compiler.graph import Graph, Node, Tensor, constant_of, is_constant, producer, readers
from vitq_compiler.sizes import Sizes
from vitq_compiler.statics import static_nodes
from vitq_compiler.views import VIEWS

KEEPING = frozenset({"Add", "Sub", "Mul", "Div", "Cast", "Identity", "Clip", "Resize", "Pad", "BatchNormalization", "Transpose"})
STEM = KEEPING | {"Conv", "MaxPool", "AveragePool", "Relu", "Gelu", "Sigmoid", "HardSwish"}
LAYOUT = VIEWS | {"Concat", "Expand", "Tile", "Cast", "Resize", "Upsample"}
MOST_OTHERS = 8  # tokens before the patches: of class, distillation, registers
WIDEST = 2  # times as wide as high, or as high as wide, at most, where the patches are no square


@dataclass(frozen=True)
class Patching:
    """How an input that is a picture is cut into patches.

    Attributes:
        name: the input.
        channels: the axis of the channels.
        count: how many channels the first convolution reads.
        sides: the axes of height and width.
        steps: pixels from one to the next output of the first convolution, along the sides.
        patch: likewise of the last convolution before the tokens.
        width: its output channels.
    """

    name: str
    channels: int
    count: int
    sides: tuple[int, ...]
    steps: tuple[int, ...]
    patch: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Table:
    """The shape of a constant that positions are made of, and whether it is resized for that."""

    shape: tuple[int, ...]
    resized: bool


def find_patchings(graph: Graph) -> list[Patching]:
    """The inputs that a convolution reads, in order."""
    return [found for spec in graph.inputs if (found := _patching(graph.tensor(spec.name))) is not None]


def _patching(source: Tensor) -> Patching | None:
    axes = list(range(len(source.shape or ())))
    found: Patching | None = None
    tensor, seen = source, set[int]()
    while id(tensor) not in seen:
        seen.add(id(tensor))
        node = next((n for n in readers(tensor) if n.op in KEEPING or (n.op in STEM and n.inputs[0] is tensor)), None)
        if node is None:
            break
        tensor = node.outputs[0]
        if node.op == "Transpose" and found is None:
            axes = [axes[axis] for axis in node.attrs.get("perm", range(len(axes))[::-1])]
        if node.op == "Conv":
            weight = constant_of(node.inputs[1])
            if weight is None or weight.ndim != len(axes) or weight.ndim < 3:
                break
            count, ones = weight.shape[1] * int(node.attrs.get("group", 1)), (1,) * (weight.ndim - 2)
            found = found or Patching(source.name, axes[1], count, tuple(axes[2:]), _strides(node, ones), ones, 0)
            found = Patching(**{**vars(found), "width": len(weight)})
        if found is not None and node.op in ("Conv", "MaxPool", "AveragePool"):
            strides = _strides(node, (1,) * len(found.sides))
            found = Patching(**{**vars(found), "patch": tuple(a * b for a, b in zip(found.patch, strides, strict=True))})
    return found


def _strides(node: Node, ones: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(s) for s in node.attrs.get("strides", ones))


def channel_sizes(patchings: Iterable[Patching]) -> Sizes:
    """The axis of the channels -> their number."""
    return {(picture.name, picture.channels): picture.count for picture in patchings}


def side_steps(patchings: Iterable[Patching]) -> Sizes:
    """The axes of height and width -> pixels from one to the next output of the first convolution."""
    return {(p.name, axis): step for p in patchings for axis, step in zip(p.sides, p.steps, strict=True)}


def implied_sides(graph: Graph, picture: Patching) -> list[tuple[int, ...]]:
    """Heights and widths that the positions of a picture's patches may be made for, the likeliest first."""
    grids = [grid for table in _tables(graph) for grid in _grids(table, picture.width, len(picture.patch))]
    return list(dict.fromkeys(tuple(a * b for a, b in zip(grid, picture.patch, strict=True)) for grid in grids))


def implied_lengths(graph: Graph) -> list[int]:
    """Of how many words the positions of a text may be known, the largest number first."""
    rows = {table.shape[-2] for table in _tables(graph) if len(table.shape) < 4 and prod(table.shape[:-2]) == 1 and not table.resized}
    return sorted(rows - {1}, reverse=True)


def _grids(table: Table, width: int, dims: int) -> Iterator[tuple[int, ...]]:
    """How many patches there are to each side, as far as a table tells."""
    shape = table.shape
    if len(shape) == dims + 2 and shape[0] == 1:
        if shape[1] == width:
            yield shape[2:]
        elif shape[-1] == width:
            yield shape[1:-1]
        elif table.resized and all(d % 2 for d in shape[2:]):
            yield tuple((d + 1) // 2 for d in shape[2:])
    elif dims == 2 and len(shape) < 4 and prod(shape[:-2]) == 1:
        yield from _flat_grids(shape[-2]) if shape[-1] == width else _relative_grids(shape[-2])


def _flat_grids(rows: int) -> Iterator[tuple[int, int]]:
    """A square of patches behind a few other tokens, or what is nearly one."""
    patches = [rows - others for others in range(min(MOST_OTHERS, rows - 1) + 1)]
    squares = [(isqrt(n), isqrt(n)) for n in patches if isqrt(n) ** 2 == n]
    yield from squares
    for n in patches[:3] if not squares else ():
        high = next((h for h in range(isqrt(n), 0, -1) if n % h == 0), 1)
        if n // high <= WIDEST * high:
            yield from ((high, n // high), (n // high, high))


def _relative_grids(rows: int) -> Iterator[tuple[int, int]]:
    """BEiT's: one row for each distance, and three of the class token; tables without these three are of windows."""
    distances = isqrt(max(rows - 3, 0))
    if distances > 1 and distances**2 == rows - 3 and distances % 2:
        yield ((distances + 1) // 2,) * 2


def _tables(graph: Graph) -> Iterator[Table]:
    """The constants that positions are made of, in the order of the graph."""
    copy = graph.snapshot()
    copy.infer_shapes()
    static = static_nodes(copy, through_shapes=True)
    for node in copy.nodes:
        if node.op not in ("Add", "Sum") or id(node) in static:
            continue
        for tensor in node.inputs:
            if is_constant(tensor) or (producer(tensor) is not None and id(producer(tensor)) in static):
                yield from _origins(tensor)


def _origins(tensor: Tensor) -> list[Table]:
    """The float constants of more than one row that a static tensor is made of by layout operations; those resized, if any are."""
    stack, seen = [tensor], set[int]()
    found: list[Table] = []
    while stack:
        current = stack.pop()
        if id(current) in seen or not current.name:
            continue
        seen.add(id(current))
        node = producer(current)
        if (array := constant_of(current)) is not None:
            found += [Table(array.shape, False)] if array.dtype.kind == "f" else []
        elif node is not None and node.op in ("Resize", "Upsample") and all(isinstance(d, int) for d in node.inputs[0].shape or [None]):
            found.append(Table(tuple(node.inputs[0].shape), True))
        elif node is not None and node.op in LAYOUT:
            stack.extend(node.inputs if node.op == "Concat" else node.inputs[:1])
    resized = [table for table in found if table.resized]
    return [table for table in resized or found if len(table.shape) > 1 and prod(table.shape[:-1]) > 1]
