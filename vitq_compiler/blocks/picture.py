"""What a graph does to a picture before its first layer with weights.

    y[channel] = scale[channel] * x[channel] + offset[channel]      then Conv(y), or patches(y) W

Exporters put scaling, mean and deviation into the graph in any order, as Mul, Div, Add, Sub or BatchNormalization, between Casts,
Resizes, crops and changes of layout. Tensors are followed from the inputs on, each with the affine that it is of its input and
with the axes of the input that its own axes are. Where a convolution over an image reads one, its axes say which axes of the
input are samples, channels, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.graph import LARGE, Graph, InputSpec, Layout, Node, Tensor, is_constant, producer, value
from vitq_compiler.runtime import run, session

Vector = NDArray[np.float64]
COLOURS = (1, 3, 4)  # channels that a picture may have
KEEPING = frozenset({"Identity", "Cast", "Dropout", "Clip", "Round"})
RESIZING = frozenset({"Resize", "Upsample", "Pad"})
UNREAD = frozenset({"Shape", "Size"})
PATCHING = frozenset({"Conv", "Reshape", "Flatten", "SpaceToDepth", "Gather", "MatMul", "Gemm"})  # begin to cut a picture into patches
LONGEST = 32  # nodes that compute a constant


@dataclass(frozen=True)
class Affine:
    """``scale * x + offset``, each [channels], or [1] for all channels alike."""

    scale: Vector
    offset: Vector

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every number as it is, but for an epsilon."""
        return bool(np.allclose(self.scale, 1, rtol=1e-3) and np.allclose(self.offset, 0, atol=1e-3))


@dataclass(frozen=True)
class Picture:
    """An input that holds pictures.

    Attributes:
        name: the input.
        layout: how; None where the graph does not show it.
        affine: what the first layer with weights reads, as a function of the input.
        resized: whether height or width change on the way.
    """

    name: str
    layout: Layout | None
    affine: Affine
    resized: bool


@dataclass(frozen=True)
class _Traced:
    """A tensor as an affine of the input ``source``.

    Attributes:
        axes: of each axis, that of the input; None where it is new.
        scale, offset: one axis for each axis of the tensor, of size 1 or that of the tensor.
        picks: of the channels, which of the input each is; None where all are there in order.
        resized: whether height or width have changed.
    """

    source: InputSpec
    axes: tuple[int | None, ...]
    scale: Vector
    offset: Vector
    picks: tuple[int, ...] | None = None
    resized: bool = False

    def moved(self, axes: tuple[int | None, ...], move: Callable[[Vector], Vector]) -> _Traced:
        """With its axes rearranged, those of the numbers by ``move``."""
        return replace(self, axes=axes, scale=move(self.scale), offset=move(self.offset))


def find_pictures(graph: Graph) -> list[Picture]:
    """The inputs of ``graph`` that hold pictures, in their order."""
    copy = graph.snapshot().clean()
    traced = {t.name: _start(spec) for t, spec in zip(copy.input_tensors, copy.inputs, strict=True) if _may_be_picture(spec)}
    ends: dict[str, list[tuple[_Traced, Node]]] = {name: [] for name in traced}
    for node in copy.nodes:
        found = [t for t in node.inputs if t.name in traced] if node.op not in UNREAD else []
        if not found:
            continue
        results = _follow(copy, node, traced)
        traced.update({t.name: result for t, result in zip(node.outputs, results or (), strict=False)})
        if results is None:
            for tensor in found:
                ends[traced[tensor.name].source.name].append((traced[tensor.name], node))
    return [picture for name in ends if (picture := _picture(ends[name])) is not None]


def _may_be_picture(spec: InputSpec) -> bool:
    return len(spec.shape) in (3, 4) and (spec.dtype.kind == "f" or spec.dtype == np.uint8)


def _start(spec: InputSpec) -> _Traced:
    rank = len(spec.shape)
    return _Traced(spec, tuple(range(rank)), np.ones((1,) * rank), np.zeros((1,) * rank))


def _picture(ends: list[tuple[_Traced, Node]]) -> Picture | None:
    """What reads the input in the end: a convolution over an image where there is one, else what first cuts it into patches."""
    shown = [(end, layout) for end, node in ends if (layout := _layout(end, node)) is not None]
    if shown:
        end, layout = shown[0]
        return Picture(end.source.name, layout, _by_channel(end, layout.channels), end.resized)
    cut = next((end for end, node in ends if node.op in PATCHING and len(end.source.shape) == 4), None)
    return None if cut is None else Picture(cut.source.name, None, _by_channel(cut, None), cut.resized)


def _layout(end: _Traced, node: Node) -> Layout | None:
    """Which axes of the input are what, by the convolution that reads it; None where ``node`` is none over a picture."""
    rank = len(end.source.shape)
    if node.op != "Conv" or len(end.axes) != 4 or not is_constant(node.inputs[1]):
        return None
    batch, channels, *sides = end.axes
    if channels is None or None in sides or len(node.inputs[1].shape) != 4 or node.inputs[1].shape[1] not in COLOURS:
        return None
    if batch is None and rank == 4:
        return None  # the batch went another way
    return Layout(batch is not None, channels) if batch in (0, None) else None


def _by_channel(end: _Traced, channels: int | None) -> Affine:
    """The affine of each channel of the input; those that the graph does not read are left as they are."""
    if end.scale.size == end.offset.size == 1:
        return Affine(end.scale.reshape(1), end.offset.reshape(1))
    size = max(end.scale.size, end.offset.size)
    scale, offset = (np.broadcast_to(x.reshape(-1), size) for x in (end.scale, end.offset))
    if end.picks is None:
        return Affine(scale, offset)
    order = {pick: place for place, pick in reversed(list(enumerate(end.picks)))}
    count = end.source.shape[channels] if channels is not None else max(order) + 1
    places = [order.get(channel) for channel in range(count if isinstance(count, int) and count > 0 else max(order) + 1)]
    return Affine(np.array([1.0 if p is None else scale[p] for p in places]), np.array([0.0 if p is None else offset[p] for p in places]))


# One node


def _follow(graph: Graph, node: Node, traced: dict[str, _Traced]) -> list[_Traced] | None:
    """What the outputs of ``node`` are; None where it does more than is followed."""
    x = traced.get(node.inputs[0].name)
    if node.op == "Concat":
        joined = _joined([traced.get(t.name) for t in node.inputs], int(node.attrs["axis"]))
        return None if joined is None else [joined]
    if node.op in ("Add", "Sub", "Mul", "Div"):
        result = _arithmetic(graph, node, traced)
    elif x is None or any(t.name in traced for t in node.inputs[1:]):
        return None
    elif node.op == "Split":
        return _split(graph, node, x)
    elif node.op in KEEPING:
        result = x
    elif node.op in RESIZING:
        result = replace(x, resized=True)
    elif node.op == "Transpose":
        order = [int(a) for a in node.attrs.get("perm", range(len(x.axes))[::-1])]
        result = x.moved(tuple(x.axes[a] for a in order), lambda numbers: numbers.transpose(order))
    elif node.op in ("Unsqueeze", "Squeeze"):
        result = _with_axes(graph, node, x)
    elif node.op == "Reshape":
        result = _reshaped(graph, node, x)
    elif node.op in ("Slice", "Gather", "GatherND"):
        result = _chosen(graph, node, x)
    else:
        result = _normalized(graph, node, x) if node.op == "BatchNormalization" else None
    return None if result is None else [result]


def _arithmetic(graph: Graph, node: Node, traced: dict[str, _Traced]) -> _Traced | None:
    place = next(i for i, t in enumerate(node.inputs) if t.name in traced)
    x, other = traced[node.inputs[place].name], _constant(graph, node.inputs[1 - place])
    if other is None or (node.op == "Div" and place == 1) or (other.ndim > len(x.axes) and other.size > 1):
        return None
    number = other.reshape((1,) * len(x.axes) if other.size == 1 else (1,) * (len(x.axes) - other.ndim) + other.shape)
    if node.op in ("Mul", "Div"):
        with np.errstate(divide="ignore"):
            factor = number if node.op == "Mul" else 1 / number
        return _checked(replace(x, scale=x.scale * factor, offset=x.offset * factor))
    if node.op == "Add":
        return _checked(replace(x, offset=x.offset + number))
    if place == 1:  # number - x
        return _checked(replace(x, scale=-x.scale, offset=number - x.offset))
    return _checked(replace(x, offset=x.offset - number))


def _normalized(graph: Graph, node: Node, x: _Traced) -> _Traced | None:
    numbers = [_constant(graph, t) for t in node.inputs[1:5]]
    if len(x.axes) < 2 or any(n is None for n in numbers):
        return None
    gamma, beta, mean, variance = (n.reshape(-1, *[1] * (len(x.axes) - 2)) for n in numbers if n is not None)
    factor = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return _checked(replace(x, scale=x.scale * factor, offset=(x.offset - mean) * factor + beta))


def _checked(x: _Traced) -> _Traced | None:
    """``x`` where its numbers are finite and differ at most along the axis of channels, else None: it is no affine of channels."""
    varying = {(axis, size) for numbers in (x.scale, x.offset) for axis, size in enumerate(numbers.shape) if size > 1}
    fits = len(varying) <= 1 and all(x.axes[axis] is not None and size in COLOURS for axis, size in varying)
    return x if fits and np.isfinite(x.scale).all() and np.isfinite(x.offset).all() else None


def _with_axes(graph: Graph, node: Node, x: _Traced) -> _Traced | None:
    given = _constant(graph, node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    if given is None:
        return None
    numbers = [int(a) for a in np.asarray(given).reshape(-1)]
    rank = len(x.axes) + len(numbers) * (node.op == "Unsqueeze")
    axes = sorted(a % rank for a in numbers)
    if node.op == "Unsqueeze":
        kept, lost = iter(x.axes), set(range(len(x.source.shape))) - set(x.axes)
        back = lost.pop() if len(axes) == len(lost) == 1 and len(x.picks or ()) == 1 else None  # one channel, taken out before
        return x.moved(tuple(back if i in axes else next(kept) for i in range(rank)), lambda n: np.expand_dims(n, tuple(axes)))
    if any(x.scale.shape[a] > 1 or x.offset.shape[a] > 1 for a in axes):
        return None
    return x.moved(tuple(a for i, a in enumerate(x.axes) if i not in axes), lambda n: np.squeeze(n, tuple(axes)))


def _reshaped(graph: Graph, node: Node, x: _Traced) -> _Traced | None:
    """A Reshape that only adds axes of size 1 in front of a shape that is known, or takes them away."""
    target = _constant(graph, node.inputs[1])
    sizes = [x.source.shape[axis] if axis is not None else 1 for axis in x.axes]
    if target is None or x.resized or x.picks is not None or not all(isinstance(s, int) and s > 0 for s in sizes):
        return None
    wanted = [int(sizes[i]) if d == 0 and i < len(sizes) else int(d) for i, d in enumerate(target.reshape(-1))]
    if wanted.count(-1) == 1:
        wanted[wanted.index(-1)] = int(np.prod(np.array(sizes, np.int64))) // max(1, int(np.prod([d for d in wanted if d != -1])))
    added = len(wanted) - len(sizes)
    if added >= 0 and wanted == [1] * added + sizes:
        return x.moved((None,) * added + x.axes, lambda n: n.reshape((1,) * added + n.shape))
    if added < 0 and sizes == [1] * -added + wanted and x.scale.shape[:-added] == x.offset.shape[:-added] == (1,) * -added:
        return x.moved(x.axes[-added:], lambda n: n.reshape(n.shape[-added:]))
    return None


# Channels picked and put together


def _chosen(graph: Graph, node: Node, x: _Traced) -> _Traced | None:
    """Slice, Gather and GatherND: channels of the input in another order or number, or a part of the picture."""
    known = [argument for t in node.inputs[1:] if (argument := _constant(graph, t)) is not None]
    if len(known) < len(node.inputs) - 1:
        return None
    arguments = [argument.astype(np.int64) for argument in known]
    if node.op == "Slice":
        return _sliced(arguments, x)
    chosen = arguments[0]
    if node.op == "GatherND":
        along_first = chosen.ndim == 2 and chosen.shape[1] == 1 and not node.attrs.get("batch_dims", 0)
        return _picked(x, 0, chosen) if along_first else None
    axis = int(node.attrs.get("axis", 0)) % len(x.axes)
    picked = _picked(x, axis, chosen) if chosen.ndim < 2 else None
    return picked if picked is None or chosen.ndim else _dropped(picked, axis)


def _sliced(arguments: list[NDArray[np.int64]], x: _Traced) -> _Traced | None:
    starts, ends, *rest = (a.reshape(-1).tolist() for a in arguments)
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    result: _Traced | None = x
    for start, end, number, step in zip(starts, ends, axes, steps, strict=True):
        if result is None:
            break
        axis = number % len(x.axes)
        width = _width(result, axis)
        if width is not None:
            result = _picked(result, axis, np.arange(width)[start : end if step > 0 or end >= -width else None : step])
        elif step == 1 and x.axes[axis] is not None and not _is_batch(x, axis):
            result = replace(result, resized=True)  # a part of the height or width
        else:
            result = None
    return result


def _split(graph: Graph, node: Node, x: _Traced) -> list[_Traced] | None:
    axis, count = int(node.attrs.get("axis", 0)) % len(x.axes), len(node.outputs)
    width = _width(x, axis)
    sizes = _constant(graph, node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("split")
    if width is None:
        return None
    cuts = np.cumsum([-(-width // count)] * count if sizes is None else np.asarray(sizes, np.int64).reshape(-1))
    parts = [_picked(x, axis, part) for part in np.split(np.arange(width), cuts[:-1])]
    return [part for part in parts if part is not None]


def _joined(parts: list[_Traced | None], axis: int) -> _Traced | None:
    """Channels of one input side by side."""
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or any(p.source is not known[0].source or p.axes != known[0].axes for p in known):
        return None
    first = known[0]
    axis %= len(first.axes)
    widths = [width for part in known if (width := _width(part, axis)) is not None]
    if len(widths) < len(known):
        return None

    def side_by_side(numbers: list[Vector]) -> Vector:
        spread = [np.broadcast_to(n, [w if i == axis else s for i, s in enumerate(n.shape)]) for n, w in zip(numbers, widths, strict=True)]
        return np.concatenate(spread, axis)

    picks = tuple(pick for part, width in zip(known, widths, strict=True) for pick in part.picks or range(width))
    scale, offset = side_by_side([p.scale for p in known]), side_by_side([p.offset for p in known])
    return _checked(replace(first, scale=scale, offset=offset, picks=picks, resized=any(p.resized for p in known)))


def _picked(x: _Traced, axis: int, places: NDArray[np.int64]) -> _Traced | None:
    """The channels at ``places`` of those that there are; None where ``axis`` is not that of the channels."""
    width, places = _width(x, axis), places.reshape(-1)
    if width is None:
        return None
    order = x.picks or tuple(range(width))

    def taken(numbers: Vector) -> Vector:
        return numbers.take(places, axis) if numbers.shape[axis] > 1 else numbers

    return replace(x, scale=taken(x.scale), offset=taken(x.offset), picks=tuple(order[place] for place in places.tolist()))


def _dropped(x: _Traced, axis: int) -> _Traced:
    return x.moved(tuple(a for i, a in enumerate(x.axes) if i != axis), lambda n: np.squeeze(n, axis))


def _width(x: _Traced, axis: int) -> int | None:
    """How many channels lie along ``axis``; None where it is another axis, or that is not known."""
    origin = x.axes[axis]
    if origin is None or _is_batch(x, axis):
        return None
    size = x.source.shape[origin]
    if size not in COLOURS or (size == 1 and x.picks is None):
        return None
    return int(size) if x.picks is None else len(x.picks)


def _is_batch(x: _Traced, axis: int) -> bool:
    return len(x.source.shape) == 4 and x.axes[axis] == 0


# Constants


def _constant(graph: Graph, tensor: Tensor) -> Vector | None:
    """The numbers of a tensor that is computed from constants alone, in few steps; None of any other."""
    if is_constant(tensor):
        return value(tensor).astype(np.float64)
    if any(leaf is None or count > LONGEST for count, leaf in enumerate(_leaves(tensor))):
        return None
    computed: Any = run(session(graph.part([], [tensor.name]), brief=True), {})[0]
    return np.asarray(computed, np.float64)


def _leaves(tensor: Tensor) -> Iterator[Tensor | None]:
    """The constants that ``tensor`` is computed from, and None for what is none, or a large one."""
    stack = [tensor]
    while stack:
        node = producer(current := stack.pop())
        if node is None:
            yield current if is_constant(current) and value(current).size <= LARGE else None
        elif node.op == "Constant":
            yield node.outputs[0]
        else:
            stack += [t for t in node.inputs if t.name]
            if not node.inputs:
                yield None  # a random number, or the like
