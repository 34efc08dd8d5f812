"""Operators of newer opsets in those of older ones.

    Attention(q, k, v)         ->  softmax(scale q k^T + mask) v on separate heads               new in 23
    Gelu(x)                    ->  x * 0.5 * (1 + erf(x / sqrt 2)), or its tanh form             new in 20
    GroupNormalization(x)      ->  InstanceNormalization of groups, scale and shift              new in 18, other in 21
    Mish(x)                    ->  x * tanh(softplus(x))                                         new in 18
    RMSNormalization(x)        ->  x / sqrt(mean(x^2) + eps) * gamma                             new in 23
    RotaryEmbedding(x)         ->  [cos * a - sin * b, sin * a + cos * b], a, b the halves of x  new in 23
    Swish(x), SwiGLU(x, g)     ->  x * sigmoid(alpha * x), * g                                   new in 24, 28

The results need opset 18 at most, 17 once `opset.lower_opset` has written their axes as an attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitq_compiler.graph import Graph, Node, Tensor
from vitq_compiler.pattern import MatchFailure

Shape = list[Any] | None  # sizes, names of open ones or None for them; None where even their number is not known
SAME: Shape = ["that of the result"]
CHANNELS_FROM = 21  # parameters of GroupNormalization are of groups before that opset, and then of channels


class Writer:
    """Appends operators that compute what a node did, all of its type and, unless told otherwise, of its shape."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node, self.result = graph, node, node.outputs[0]

    def numbers(self, of: ArrayLike) -> Tensor:
        """A constant of the node's type."""
        return self.graph.constant(f"{self.node.name}/number", np.asarray(of, self.result.dtype or np.float32))

    def sizes(self, *of: int) -> Tensor:
        """A constant of whole numbers: a shape, or axes."""
        return self.graph.constant(f"{self.node.name}/sizes", np.array(of, np.int64))

    def op(self, kind: str, *inputs: Tensor, shape: Shape = SAME, **attributes: Any) -> Tensor:
        """An operator of one output."""
        tensor = self.graph.insert(kind, inputs, name=f"{self.node.name}/{kind.lower()}", like=self.result, **attributes)
        tensor.shape = self.result.shape if shape is SAME else shape
        return tensor


def attend(
    w: Writer, heads: Sequence[Tensor], head_dim: int, scale: float = 0.0, masks: Sequence[Tensor | None] = (), *, causal: bool = False
) -> Tensor:
    """softmax(scale q k^T + masks) v of q, k^T and v [batch, heads, ., .].

    Args:
        w: writes for the node that did this.
        heads: q, k^T and v.
        head_dim: features of a head of q.
        scale: of the scores; 0 stands for 1 / sqrt(head_dim).
        masks: what is added to the scaled scores, which may have fewer axes; None is nothing.
        causal: whether a query sees the keys up to its own place alone; then there are as many of both.
    """
    q, k, v = heads
    scores = w.op("MatMul", q, k, shape=_product_shape(q, k))
    scale = scale or head_dim**-0.5
    if scale != 1:
        scores = w.op("Mul", scores, w.numbers(scale), shape=scores.shape)
    given = [mask for mask in masks if mask is not None]
    if causal:
        sizes = w.graph.add("Shape", [scores], name=f"{w.node.name}/sizes", start=-2)
        square = list(scores.shape)[-2:] if scores.shape else None
        low = w.op("Expand", w.numbers([[-np.inf]]), sizes, shape=square)
        given.append(w.op("Trilu", low, w.graph.constant(f"{w.node.name}/later", np.array(1, np.int64)), upper=1, shape=square))
    if given:
        mask, *others = given
        for other in others:
            mask = w.op("Add", mask, other, shape=scores.shape)
        scores = w.op("Add", scores, mask, shape=scores.shape)
    weights = w.op("Softmax", scores, axis=-1, shape=scores.shape)
    return w.op("MatMul", weights, v, shape=_product_shape(q, v))


def _product_shape(left: Tensor, right: Tensor) -> Shape:
    return [*left.shape[:-1], right.shape[-1]] if left.shape and right.shape else None


def split_heads(w: Writer, tensor: Tensor, heads: int, *, transposed: bool = False) -> Tensor:
    """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim], or its last two axes exchanged."""
    batch, tokens, features = tensor.shape or (None, None, None)
    size = features // heads if isinstance(features, int) else None
    split = w.op("Reshape", tensor, w.sizes(0, 0, heads, -1), shape=[batch, tokens, heads, size])
    order = [0, 2, 3, 1] if transposed else [0, 2, 1, 3]
    return w.op("Transpose", split, perm=order, shape=[split.shape[axis] for axis in order])


def merge_heads(w: Writer, tensor: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, heads * head_dim]."""
    batch, heads, tokens, size = tensor.shape or (None,) * 4
    return w.op("Reshape", w.op("Transpose", tensor, perm=[0, 2, 1, 3], shape=[batch, tokens, heads, size]), w.sizes(0, 0, -1))


def _attention(graph: Graph, node: Node) -> Tensor:
    w, (q, k, v), mask = Writer(graph, node), node.inputs[:3], _given(node, 3)
    flat = len(q.shape or ()) == 3
    if any(_given(node, index) is not None for index in range(4, len(node.inputs))):
        raise MatchFailure("it has a cache", node.name)
    if any(graph.is_output(t) or t.outputs for t in node.outputs[1:]):
        raise MatchFailure("more than its first output is read", node.name)
    if node.attrs.get("softcap", 0.0) or any(node.attrs.get(f"{side}_window_size", -1) != -1 for side in ("left", "right")):
        raise MatchFailure("it caps its scores, or sees a window of keys", node.name)
    if len(q.shape or ()) not in (3, 4) or not isinstance(q.shape[-1], int):
        raise MatchFailure("the shape of its queries is not known", node.name)
    heads, of_keys = (int(node.attrs[f"{x}_num_heads"]) if flat else t.shape[1] for x, t in (("q", q), ("kv", k)))
    causal, tokens = bool(node.attrs.get("is_causal", 0)), [t.shape[-2] for t in (q, k)]
    if causal and (tokens[0] is None or tokens[0] != tokens[1]):
        raise MatchFailure(f"it is causal, with {tokens[0]} queries and {tokens[1]} keys", node.name)
    if mask is not None and mask.dtype == np.bool_:
        mask = w.op("Where", mask, w.numbers(0.0), w.numbers(-np.inf), shape=mask.shape)
    if flat:
        q, v = split_heads(w, q, heads), split_heads(w, v, of_keys)
        k = split_heads(w, k, of_keys, transposed=heads == of_keys)
    if heads != of_keys:
        k, v = (_repeat_heads(w, tensor, heads // of_keys) for tensor in (k, v))
    if not flat or heads != of_keys:
        k = w.op("Transpose", k, perm=[0, 1, 3, 2], shape=[k.shape[axis] for axis in (0, 1, 3, 2)])
    context = attend(w, (q, k, v), q.shape[-1], float(node.attrs.get("scale", 0.0)), [mask], causal=causal)
    return merge_heads(w, context) if flat else context


def _repeat_heads(w: Writer, tensor: Tensor, times: int) -> Tensor:
    """Each head of keys or values for all the queries that share it."""
    batch, heads, tokens, size = tensor.shape
    single = w.op("Unsqueeze", tensor, w.sizes(2), shape=[batch, heads, 1, tokens, size])
    many = w.op("Expand", single, w.sizes(1, 1, times, 1, 1), shape=[batch, heads, times, tokens, size])
    return w.op("Reshape", many, w.sizes(0, heads * times, -1, size), shape=[batch, heads * times, tokens, size])


def _given(node: Node, index: int) -> Tensor | None:
    """An optional input, where it is given."""
    return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None


def _gelu(graph: Graph, node: Node) -> Tensor:
    w, x = Writer(graph, node), node.inputs[0]
    if node.attrs.get("approximate", "none") == "tanh":
        cube = w.op("Mul", w.op("Mul", w.op("Mul", x, x), x), w.numbers(0.044715))
        gate = w.op("Tanh", w.op("Mul", w.op("Add", x, cube), w.numbers(sqrt(2 / pi))))
    else:
        gate = w.op("Erf", w.op("Div", x, w.numbers(sqrt(2))))
    return w.op("Mul", w.op("Mul", x, w.op("Add", gate, w.numbers(1.0))), w.numbers(0.5))


def _mish(graph: Graph, node: Node) -> Tensor:
    w, x = Writer(graph, node), node.inputs[0]
    return w.op("Mul", x, w.op("Tanh", w.op("Softplus", x)))


def _swish(graph: Graph, node: Node) -> Tensor:
    w, x = Writer(graph, node), node.inputs[0]
    alpha = float(node.attrs.get("alpha", 1.0))
    return w.op("Mul", x, w.op("Sigmoid", x if alpha == 1 else w.op("Mul", x, w.numbers(alpha))))


def _swiglu(graph: Graph, node: Node) -> Tensor:
    return Writer(graph, node).op("Mul", _swish(graph, node), node.inputs[1])


def _rms_normalization(graph: Graph, node: Node) -> Tensor:
    """In the words that ONNX Runtime finds again."""
    w, x = Writer(graph, node), node.inputs[0]
    axis, rank = int(node.attrs.get("axis", -1)), len(x.shape or ())
    if axis >= 0 and not rank:
        raise MatchFailure("the number of its axes is not known", node.name)
    axes = range(axis - rank if axis >= 0 else axis, 0)
    means = [*x.shape[: axes.start], *(1 for _ in axes)] if rank else None
    squares = w.op("Pow", x, w.numbers(2.0))
    mean = w.op("ReduceMean", squares, w.sizes(*axes), keepdims=1, shape=means)
    root = w.op("Sqrt", w.op("Add", mean, w.numbers(float(node.attrs.get("epsilon", 1e-5))), shape=means), shape=means)
    return w.op("Mul", w.op("Div", x, root), node.inputs[1])


def _group_normalization(graph: Graph, node: Node) -> Tensor:
    w, (x, scale, bias) = Writer(graph, node), node.inputs[:3]
    shape, groups = list(x.shape or ()), int(node.attrs["num_groups"])
    by_group = graph.opset < CHANNELS_FROM
    parameters = (scale, bias) if by_group else (w.numbers([1.0] * groups), w.numbers([0.0] * groups))
    grouped = w.op("Reshape", x, w.sizes(0, groups, -1), shape=[*shape[:1], groups, None])
    normal = w.op("InstanceNormalization", grouped, *parameters, epsilon=node.attrs.get("epsilon", 1e-5), shape=grouped.shape)
    image = w.op("Reshape", normal, graph.add("Shape", [x], name=f"{node.name}/shape"))
    if by_group:
        return image
    if not shape:
        raise MatchFailure("the number of its axes is not known", node.name)
    column = [-1, *[1] * (len(shape) - 2)]  # a number for each channel, on the axis of the channels
    scale, bias = (w.op("Reshape", tensor, w.sizes(*column), shape=[shape[1], *column[1:]]) for tensor in (scale, bias))
    return w.op("Add", w.op("Mul", image, scale), bias)


def _rotary_embedding(graph: Graph, node: Node) -> Tensor:
    """On [batch, heads, tokens, features], or on heads side by side in [batch, tokens, features]."""
    w, x = Writer(graph, node), node.inputs[0]
    shape, heads = list(x.shape or ()), int(node.attrs.get("num_heads", 0))
    flat = len(shape) == 3
    if len(shape) not in (3, 4) or not isinstance(shape[-1], int) or (flat and not heads):
        raise MatchFailure("its heads and their size are not known", node.name)
    size = shape[-1] // heads if flat else shape[-1]
    turned = int(node.attrs.get("rotary_embedding_dim", 0)) or size
    if flat:
        shape = [*shape[:2], heads, size]
        x = w.op("Reshape", x, w.sizes(0, 0, heads, size), shape=shape)
    angles = [shape[0], shape[1], 1, turned // 2] if flat else [shape[0], 1, shape[2], turned // 2]
    cos, sin = node.inputs[1:3]
    if (places := _given(node, 3)) is not None:
        cos, sin = (w.op("Gather", table, places, axis=0, shape=[*shape[:1], None, turned // 2]) for table in (cos, sin))
    cos, sin = (w.op("Unsqueeze", table, w.sizes(2 if flat else 1), shape=angles) for table in (cos, sin))

    def part(start: int, end: int, step: int = 1) -> Tensor:
        width = len(range(start, end, step))
        ends = (w.sizes(number) for number in (start, end, -1, step))
        return w.op("Slice", x, *ends, shape=[*shape[:-1], width])

    def turn(kind: str, first: Tensor, second: Tensor) -> Tensor:
        half = [*shape[:-1], turned // 2]
        return w.op(kind, w.op("Mul", first, a, shape=half), w.op("Mul", second, b, shape=half), shape=half)

    interleaved = bool(node.attrs.get("interleaved", 0))
    a, b = (part(0, turned, 2), part(1, turned, 2)) if interleaved else (part(0, turned // 2), part(turned // 2, turned))
    halves = [turn("Sub", cos, sin), turn("Add", sin, cos)]
    whole = [*shape[:-1], turned]
    if interleaved:
        columns = [w.op("Unsqueeze", half, w.sizes(-1), shape=[*half.shape, 1]) for half in halves]
        pairs = w.op("Concat", *columns, axis=-1, shape=[*halves[0].shape, 2])
        result = w.op("Reshape", pairs, w.sizes(0, 0, 0, turned), shape=whole)
    else:
        result = w.op("Concat", *halves, axis=-1, shape=whole)
    if turned < size:
        result = w.op("Concat", result, part(turned, size), axis=-1, shape=shape)
    return w.op("Reshape", result, w.sizes(0, 0, heads * size)) if flat else result


DECOMPOSED: Mapping[str, Callable[[Graph, Node], Tensor]] = {
    "Attention": _attention,
    "Gelu": _gelu,
    "GroupNormalization": _group_normalization,
    "Mish": _mish,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "SwiGLU": _swiglu,
    "Swish": _swish,
}
