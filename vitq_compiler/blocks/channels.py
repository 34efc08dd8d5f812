"""Where the channels of a tensor are before and after an operation that treats all channels alike.

Such an operation commutes with every linear map R of the channels: f(x R) = f(x) R. Layout operations, sums, selections and
means of tokens are of this kind; with R 1 = 1, so are the addition of one number to all channels and, without an affine,
LayerNormalization and RMSNormalization. Its axis may hold the channels several times over (patch merging puts four tokens side
by side).
"""

from __future__ import annotations

from math import prod

from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.graph import Node, Tensor, is_constant, value
from vitq_compiler.pattern import MatchFailure

Sizes = list[int | str | None]
RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
REARRANGING = RESHAPING | {"Transpose", "Identity", "Slice", "Split", "Gather", "Concat", "Expand", "ReduceMean", "GlobalAveragePool"}
CARRIERS = REARRANGING | {"Add", "Sub", "Sum", "Mul", "Div", "Pad"} | NORMS
ELEMENTWISE = frozenset({"Add", "Sub", "Sum", "Mul", "Div"})
ALIGNED_RIGHT = ELEMENTWISE | {"Expand"}


def carry(node: Node, tensor: Tensor, axis: int, width: int) -> list[tuple[Tensor, int]]:
    """The other tensors of ``node`` that hold the same channels as ``tensor``, each with its axis of channels.

    Args:
        node: of an op type in `CARRIERS`, one of whose inputs or outputs ``tensor`` is.
        tensor: what holds the channels along ``axis``.
        axis: counted from the front.
        width: number of channels; the axis is a multiple of it long.

    Raises:
        MatchFailure: the channels do not all fare alike.
    """
    operands = list(node.inputs) if node.op in ELEMENTWISE | {"Concat"} else node.inputs[:1]
    if not any(tensor is t for t in [*operands, *node.outputs]):
        raise MatchFailure(f"{node.op} {node.name} reads it as a parameter", node.name)
    out_axis = axis if any(tensor is t for t in node.outputs) else _after(node, tensor, axis, width)
    _check_untouched(node, out_axis)
    places = [(t, out_axis) for t in node.outputs]
    for operand in operands:
        place = _before(node, operand, out_axis, width)
        if node.op in ELEMENTWISE and (place < 0 or _sizes(operand)[place] == 1):
            continue  # one number for all channels
        places.append((operand, place))
    if node.op in ("Mul", "Div"):
        carried = [t for t in operands if any(t is place[0] for place in places)]
        if len(carried) > 1 or (node.op == "Div" and carried and carried[0] is not node.inputs[0]):
            raise MatchFailure(f"{node.op} {node.name} scales each channel in its own way", node.name)
    for other, place in places:
        size = _sizes(other)[place] if place >= 0 else None
        if not isinstance(size, int) or size % width or not size:
            raise MatchFailure(f"{node.op} {node.name} mixes its channels with others", node.name)
    if not any(tensor is t and axis == place for t, place in places):
        raise MatchFailure(f"{node.op} {node.name} moves its channels", node.name)
    return [(t, place) for t, place in places if t is not tensor]


def _sizes(tensor: Tensor) -> Sizes:
    if is_constant(tensor):
        return list(value(tensor).shape)
    if tensor.shape is None:
        raise MatchFailure(f"the shape of {tensor.name} is unknown", tensor.name)
    return list(tensor.shape)


def _after(node: Node, operand: Tensor, axis: int, width: int) -> int:
    """The axis of the first output that holds what ``operand`` holds along ``axis``."""
    rank, out_rank = len(_sizes(operand)), len(_sizes(node.outputs[0]))
    if node.op in RESHAPING:
        return _reshaped(node, _sizes(operand), axis, _sizes(node.outputs[0]), width)
    if node.op == "Transpose":
        return list(node.attrs.get("perm", range(rank)[::-1])).index(axis)
    if node.op in ALIGNED_RIGHT:
        return axis + out_rank - rank
    kept = _kept_axes(node, rank)
    if axis not in kept:
        raise MatchFailure(f"{node.op} {node.name} runs over its channels", node.name)
    return kept.index(axis)


def _before(node: Node, operand: Tensor, axis: int, width: int) -> int:
    """The axis of ``operand`` that becomes ``axis`` of the first output; negative where it has none."""
    rank, out_rank = len(_sizes(operand)), len(_sizes(node.outputs[0]))
    if node.op in RESHAPING:
        return _reshaped(node, _sizes(node.outputs[0]), axis, _sizes(operand), width)
    if node.op == "Transpose":
        return int(list(node.attrs.get("perm", range(rank)[::-1]))[axis])
    if node.op in ALIGNED_RIGHT:
        return axis + rank - out_rank
    kept = _kept_axes(node, rank)[axis]
    if kept is None:
        raise MatchFailure(f"{node.op} {node.name} makes its channels", node.name)
    return kept


def _kept_axes(node: Node, rank: int) -> list[int | None]:
    """For each axis of the output, the axis of the input that it is, or None."""
    axes: list[int | None] = list(range(rank))
    if node.op == "Gather":
        chosen = node.attrs.get("axis", 0) % rank
        axes[chosen : chosen + 1] = [None] * len(_sizes(node.inputs[1]))
    if node.op == "ReduceMean":
        reduced = _axes_of(node, rank)
        return [None if a in reduced else a for a in axes] if node.attrs.get("keepdims", 1) else [a for a in axes if a not in reduced]
    return axes


def _axes_of(node: Node, rank: int) -> list[int]:
    """The axes that a ReduceMean runs over; all where it does not say."""
    if len(node.inputs) > 1 and is_constant(node.inputs[1]):
        return [int(a) % rank for a in value(node.inputs[1]).reshape(-1)]
    return [int(a) % rank for a in node.attrs.get("axes", range(rank))]


def _reshaped(node: Node, sizes: Sizes, axis: int, target: Sizes, width: int) -> int:
    """The axis of ``target`` with as many elements behind it, a multiple of ``width`` long: element i has channel i % width there."""
    behind = sizes[axis + 1 :]
    if all(isinstance(d, int) and d > 0 for d in behind):
        inner, elements = prod(behind), 1  # type: ignore[arg-type]  # all are int
        for place in reversed(range(len(target))):
            size = target[place]
            if not isinstance(size, int) or size < 1:
                break
            if elements == inner and size % width == 0:
                return place
            elements *= size
    raise MatchFailure(f"{node.op} {node.name} takes its channels apart", node.name)


def _check_untouched(node: Node, axis: int) -> None:
    """Refuse an operation that works along the channels where `carry` takes it to work across them."""
    rank = len(_sizes(node.outputs[0]))
    touched = False
    if node.op == "Slice":
        chosen = value(node.inputs[3]).reshape(-1) if len(node.inputs) > 3 and is_constant(node.inputs[3]) else range(rank)
        touched = any(int(a) % rank == axis for a in chosen)
    elif node.op == "Split":
        touched = node.attrs.get("axis", 0) % rank == axis
    elif node.op == "Pad":
        ends = value(node.inputs[1]) if is_constant(node.inputs[1]) and len(node.inputs) < 4 else None
        touched = ends is None or bool(ends[axis] or ends[axis + rank])
    elif node.op == "GlobalAveragePool":
        touched = axis != 1
    elif node.op in NORMS:
        touched = axis != rank - 1 or node.attrs.get("axis", -1) % rank != axis
    if touched:
        raise MatchFailure(f"{node.op} {node.name} does not treat its channels alike", node.name)
