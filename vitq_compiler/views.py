"""View tracing: which element of a source tensor ends up where, through any chain of layout operations.

Exporters split q, k and v out of a Linear in many ways (Reshape and Transpose, Split, Slice and Squeeze, Gather, through
3-D or 4-D). Rather than know them all, `trace` walks up the chain and pushes an array of element numbers through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.graph import Node, Tensor, is_constant, producer, scalar, value
from vitq_compiler.pattern import MatchFailure

T = TypeVar("T", np.int64, np.bool_)

BATCH = 2  # stands for a dynamic first axis while tracing
OTHERS = (3, 5, 7)  # stand for other dynamic axes, as those of the tokens, or of height and width
VIEWS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Identity"})


@dataclass(frozen=True)
class View:
    """``tensor`` = scale * (a rearrangement of ``source``).

    Attributes:
        source: where the chain of layout operations begins.
        scale: product of the numbers multiplied in on the way.
        index: shape of the viewed tensor at batch 2; entry = flat position in ``source``.
        source_shape: shape of ``source`` at batch 2.
    """

    source: Tensor
    scale: float
    index: NDArray[np.int64]
    source_shape: tuple[int, ...]


def trace(tensor: Tensor, rows: int = BATCH) -> View:
    """Follow ``tensor`` up through layout operations and multiplications by a number; ``rows`` stands for a dynamic first axis.

    Raises:
        MatchFailure: a shape on the way is unknown.
    """
    chain: list[tuple[Node, Tensor]] = []
    scale = 1.0
    while (node := producer(tensor)) is not None:
        if node.op in VIEWS and all(is_constant(t) for t in node.inputs[1:]):
            chain.append((node, tensor))
            tensor = node.inputs[0]
        elif node.op == "Mul" and (numbers := [i for i in (0, 1) if scalar(node.inputs[i]) is not None]):
            scale *= scalar(node.inputs[numbers[0]]) or 0.0
            tensor = node.inputs[1 - numbers[0]]
        elif node.op == "Div" and scalar(node.inputs[1]):
            scale /= scalar(node.inputs[1]) or 1.0
            tensor = node.inputs[0]
        else:
            break
    shape = static_shape(tensor, rows)
    index = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    for node, result in reversed(chain):
        index = moved(node, result, index)
    return View(tensor, scale, index, shape)


def static_shape(tensor: Tensor, rows: int = BATCH) -> tuple[int, ...]:
    """The shape with ``rows`` for a dynamic first axis, and one of `OTHERS` for each other dynamic size.

    Raises:
        MatchFailure: several sizes are unknown, and have no names to tell them apart.
    """
    if tensor.shape is None:
        raise MatchFailure(f"the shape of {tensor.name} is unknown", tensor.name)
    sizes = [d if isinstance(d, int) and d > 0 else None for d in tensor.shape]
    if sizes and sizes[0] is None:
        sizes[0] = rows
    names = list(dict.fromkeys(tensor.shape[axis] or None for axis, size in enumerate(sizes) if size is None))
    if len(names) > len(OTHERS) or (None in names and sizes.count(None) > 1):
        raise MatchFailure(f"the shape {list(tensor.shape)} of {tensor.name} is not static apart from the batch and one axis", tensor.name)
    return tuple(OTHERS[names.index(tensor.shape[axis] or None)] if size is None else size for axis, size in enumerate(sizes))


def moved(node: Node, result: Tensor, x: NDArray[T]) -> NDArray[T]:
    """What the layout operation ``node``, with constant arguments, makes of ``x`` in its output ``result``.

    Raises:
        MatchFailure: it fixes the batch, or runs backwards.
    """
    arguments = [value(t) for t in node.inputs[1:]]
    if node.op == "Reshape":
        target = [int(d) for d in arguments[0]]
        if not node.attrs.get("allowzero", 0):
            target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
        try:
            return x.reshape(target)
        except ValueError:
            raise MatchFailure(f"Reshape to {target} fixes the batch", node.name) from None
    if node.op == "Flatten":
        axis = node.attrs.get("axis", 1)
        return x.reshape(int(np.prod(x.shape[:axis])), -1)
    if node.op == "Transpose":
        return x.transpose(node.attrs.get("perm", list(range(x.ndim))[::-1]))
    if node.op == "Squeeze":
        return np.squeeze(x, tuple(int(a) for a in arguments[0]) if arguments else None)
    if node.op == "Unsqueeze":
        return np.expand_dims(x, tuple(int(a) for a in arguments[0]))
    if node.op == "Gather":
        return np.take(x, arguments[0], axis=node.attrs.get("axis", 0))
    if node.op == "Slice":
        starts, ends = arguments[0], arguments[1]
        axes = arguments[2] if len(arguments) > 2 else np.arange(len(starts))
        steps = arguments[3] if len(arguments) > 3 else np.ones(len(starts), np.int64)
        window = [slice(None)] * x.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            window[int(axis)] = slice(int(start), int(end), int(step)) if step > 0 else _refuse(node)
        return x[tuple(window)]
    if node.op == "Split":
        axis = node.attrs.get("axis", 0)
        which = next(i for i, t in enumerate(node.outputs) if t is result)
        count = len(node.outputs)
        sizes = arguments[0] if arguments else np.full(count, -(-x.shape[axis] // count))  # the last may be smaller
        return np.split(x, np.cumsum(sizes)[:-1].astype(int), axis=axis)[which]
    return x  # Identity


def _refuse(node: Node) -> slice:
    raise MatchFailure("Slice runs backwards", node.name)
