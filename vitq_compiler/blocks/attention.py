"""Scaled dot-product attention: softmax(scale * q k^T + mask) v, with q, k, v taken from Linear layers by any views."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.linear import Linear, add_to_bias
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, readers, scalar, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.quant import Edge
from vitq_compiler.views import BATCH, VIEWS, moved, static_shape, trace

OPERANDS = ("q", "k", "probs", "v")  # of the two products q k^T and probs v
CHANNEL_AXES = {"q": (-1,), "k": (-2,), "probs": (-1,), "v": (1, -1)}  # of each operand: k is transposed there, v has its heads apart


@dataclass(eq=False)
class HeadView:
    """One of q, k, v as heads of a token sequence.

    Attributes:
        linear: the Linear layer it is a part of.
        columns: output features of ``linear`` that make it up, head by head, shape [heads * head_dim].
    """

    linear: Linear
    columns: NDArray[np.int64]


@dataclass(eq=False, kw_only=True)
class Values:
    """The half of an attention block behind the softmax, whatever the scores are made of.

    Attributes:
        v: the values.
        softmax, context: the nodes softmax and P v, P the probabilities as they leave the softmax.
        proj: the Linear that reads the merged heads.
        heads: number of heads.
        index: position among the attention blocks of the graph.
        fused: the Attention node that has replaced the products, if any.
    """

    v: HeadView
    softmax: Node
    context: Node
    proj: Linear
    heads: int
    index: int = 0
    fused: Node | None = None

    @property
    def ends(self) -> dict[str, Node]:
        """Operand, of ``qkv`` -> the node that takes its product."""
        return {"v": self.context if self.fused is None else self.fused}

    @property
    def edges(self) -> dict[str, Edge]:
        """Operand, of `OPERANDS` -> where it enters its product, as far as that is known; none once the products are one node."""
        places = {"probs": Edge(self.context.name, 0), "v": Edge(self.context.name, 1)}
        return places if self.fused is None else {}

    @property
    def views(self) -> dict[str, HeadView]:
        """Operand, of ``qkv`` -> the features it is made of, as far as they are known."""
        return {"v": self.v}


@dataclass(eq=False, kw_only=True)
class Attention(Values):
    """One attention block.

    Attributes:
        q, k: the other operands.
        scores: the node q k^T.
        mask: what is added to the scaled scores, or None.
        scale: what the scores are multiplied by.
    """

    q: HeadView
    k: HeadView
    scores: Node
    mask: Tensor | None
    scale: float

    @property
    def ends(self) -> dict[str, Node]:
        return super().ends | dict.fromkeys("qk", self.scores if self.fused is None else self.fused)

    @property
    def views(self) -> dict[str, HeadView]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def edges(self) -> dict[str, Edge]:
        places = {"q": Edge(self.scores.name, 0), "k": Edge(self.scores.name, 1)}
        return places | super().edges if self.fused is None else {}

    @property
    def linears(self) -> list[Linear]:
        """The distinct Linear layers that give q, k and v."""
        found: list[Linear] = []
        for view in self.views.values():
            if not any(view.linear.matmul is other.matmul for other in found):
                found.append(view.linear)
        return found


def find_attention(graph: Graph, linears: list[Linear]) -> tuple[list[Attention], list[MatchFailure]]:
    """All attention blocks in graph order, and for each other Softmax the reason."""
    found: list[Attention] = []
    failures: list[MatchFailure] = []
    for softmax in graph.find("Softmax"):
        try:
            found.append(match_attention(softmax, linears))
            found[-1].index = len(found) - 1
        except MatchFailure as failure:
            failures.append(MatchFailure(failure.reason, softmax.name))
    return found, failures


def match_attention(softmax: Node, linears: list[Linear]) -> Attention:
    """The attention block around ``softmax``, its operands among ``linears``.

    Raises:
        MatchFailure: there is none; the reason names what differs.
    """
    scores, scale, mask = _scores(softmax)
    q, k, scale_inside = query_and_key(scores, linears)
    half = match_values(softmax, linears)
    return Attention(**vars(half), q=q, k=k, scores=scores, mask=mask, scale=scale * scale_inside)


def match_values(softmax: Node, linears: list[Linear]) -> Values:
    """What is behind ``softmax``: its product with values from one of ``linears``, heads merged, and the projection.

    Raises:
        MatchFailure: something else is there; the reason names what.
    """
    if softmax.attrs.get("axis", -1) not in (-1, len(softmax.outputs[0].shape or ()) - 1):
        raise MatchFailure("softmax runs along another axis than the last", softmax.name)
    context = _only_reader(softmax.outputs[0], "MatMul")
    if context.inputs[0] is not softmax.outputs[0]:
        raise MatchFailure("the probabilities are not the left operand of a MatMul", context.name)
    v = value_view(context, linears)
    heads = v.columns.size // int(context.inputs[1].shape[-1])
    proj = _projection(context, heads, {id(linear.matmul): linear for linear in linears})
    return Values(v=v, softmax=softmax, context=context, proj=proj, heads=heads)


def query_and_key(scores: Node, linears: list[Linear]) -> tuple[HeadView, HeadView, float]:
    """q and k of the product q k^T, and what they are multiplied by on the way from their Linear layers.

    Raises:
        MatchFailure: one is no plain split of a Linear into heads.
    """
    by_output = {id(linear.output): linear for linear in linears}
    (q, scale_q), (k, scale_k) = (_head_view(scores.inputs[i], by_output, transposed=i == 1) for i in (0, 1))
    return q, k, scale_q * scale_k


def value_view(context: Node, linears: list[Linear]) -> HeadView:
    """v of the product P v.

    Raises:
        MatchFailure: it is no plain split of a Linear into heads, or scaled.
    """
    v, scale = _head_view(context.inputs[1], {id(linear.output): linear for linear in linears}, transposed=False)
    if scale != 1:
        raise MatchFailure("the values are scaled", context.name)
    return v


def _scores(softmax: Node) -> tuple[Node, float, Tensor | None]:
    tensor, scale, mask = softmax.inputs[0], 1.0, None
    while (node := producer(tensor)) is not None and node.op in ("Mul", "Div", "Add"):
        number = scalar(node.inputs[1])
        if node.op == "Add":
            if mask is not None or scale != 1:
                raise MatchFailure("two masks, or one below the scaling", node.name)
            paths = [i for i in (0, 1) if is_product(node.inputs[i])]
            if len(paths) != 1:
                raise MatchFailure("cannot tell the scores from the mask", node.name)
            tensor, mask = node.inputs[paths[0]], node.inputs[1 - paths[0]]
            continue
        if node.op == "Mul" and number is None:
            number, tensor = scalar(node.inputs[0]), node.inputs[1]
        else:
            tensor = node.inputs[0]
        if not number:
            raise MatchFailure("the scores are scaled by a tensor", node.name)
        scale = scale * number if node.op == "Mul" else scale / number
    if node is None or node.op != "MatMul" or is_constant(node.inputs[1]):
        raise MatchFailure(
            f"the softmax input comes from {node.op if node else 'a graph input'}, not from a product of activations", softmax.name
        )
    return node, scale, mask


def is_product(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a product of two activations, at most scaled by numbers."""
    node = producer(tensor)
    while node is not None and node.op in ("Mul", "Div") and any(scalar(t) is not None for t in node.inputs):
        tensor = next(t for t in node.inputs if scalar(t) is None)
        node = producer(tensor)
    return node is not None and node.op == "MatMul" and not is_constant(node.inputs[1])


def _head_view(tensor: Tensor, by_output: dict[int, Linear], *, transposed: bool) -> tuple[HeadView, float]:
    """``tensor`` [batch, heads, tokens, head_dim] as a view of a Linear output [batch, ..., features], and its scale.

    Heads may be counted into the batch, or a single head have no axis; a Linear on one token may have no axis for it.
    ``transposed``: tokens and head_dim are exchanged.
    """
    view = trace(tensor)
    linear = by_output.get(id(view.source))
    if linear is None:
        node = producer(view.source)
        raise MatchFailure(f"an operand comes from {node.op if node else 'a graph input'}, not from a Linear", node.name if node else "")
    if len(view.source_shape) < 2:
        raise MatchFailure(f"an operand is viewed from {len(view.source_shape)} axes", linear.name)
    batch, features = view.source_shape[0], view.source_shape[-1]
    tokens = int(np.prod(view.source_shape[1:-1]))
    index = view.index.swapaxes(-1, -2) if transposed else view.index
    if index.ndim == 3 and index.shape[0] % batch == 0:
        index = index.reshape(batch, -1, *index.shape[1:])
    if index.ndim != 4:
        raise MatchFailure(f"an operand has {index.ndim} axes, not batch, heads, tokens, features", linear.name)
    columns = index[0, :, 0, :]
    expected = (np.arange(batch)[:, None, None, None] * tokens + np.arange(tokens)[None, None, :, None]) * features + columns[
        None, :, None, :
    ]
    if index.shape != expected.shape or not np.array_equal(index, expected):
        raise MatchFailure("an operand is no split of a Linear into heads over the same tokens", linear.name)
    return HeadView(linear, columns.reshape(-1)), view.scale


def _projection(context: Node, heads: int, by_matmul: dict[int, Linear]) -> Linear:
    tensor = context.outputs[0]
    for _ in range(6):
        node = _only_reader(tensor, "Transpose", "Reshape", "MatMul", "Identity")
        if node.op == "MatMul":
            linear = by_matmul.get(id(node))
            if linear is None or node.inputs[0] is not tensor:
                break
            view = trace(tensor, rows=BATCH * heads if len(context.outputs[0].shape or ()) == 3 else BATCH)
            if view.source is not context.outputs[0] or view.index.ndim < 3:
                break
            batch, features = view.index.shape[0], view.index.shape[-1]
            tokens = int(np.prod(view.index.shape[1:-1]))
            merged = np.arange(view.index.size).reshape(batch, heads, tokens, -1).swapaxes(1, 2).reshape(batch, tokens, features)
            if not np.array_equal(view.index.reshape(merged.shape), merged):
                raise MatchFailure("the heads are not merged in order", node.name)
            return linear
        tensor = node.outputs[0]
    raise MatchFailure("the merged heads do not reach a Linear", context.name)


def _only_reader(tensor: Tensor, *ops: str) -> Node:
    nodes = readers(tensor)
    if len(nodes) != 1 or nodes[0].op not in ops:
        raise MatchFailure(
            f"{tensor.name} is read by {', '.join(n.op for n in nodes) or 'nothing'}, not by one {' or '.join(ops)}", tensor.name
        )
    return nodes[0]


def feeds_only(graph: Graph, tensor: Tensor, attention: Attention) -> bool:
    """Whether everything computed from ``tensor`` by views and scalings ends in the products of ``attention``."""
    ends = (attention.scores, attention.context) if attention.fused is None else (attention.fused,)
    stack = [tensor]
    while stack:
        current = stack.pop()
        if graph.is_output(current):
            return False
        for node in readers(current):
            if any(node is end for end in ends):
                continue
            if node.op not in VIEWS | {"Mul", "Div"}:
                return False
            stack.extend(node.outputs)
    return True


def _ends_in(graph: Graph, view: HeadView, end: Node) -> bool:
    """Whether everything computed from the features of ``view`` by views and scalings ends in the node ``end``."""
    shape = static_shape(view.linear.output)
    stack = [(view.linear.output, np.broadcast_to(np.isin(np.arange(shape[-1]), view.columns), shape))]
    while stack:
        tensor, own = stack.pop()
        if not own.any():
            continue
        if graph.is_output(tensor):
            return False
        for node in readers(tensor):
            if node is end:
                continue
            if node.op in VIEWS and all(is_constant(t) for t in node.inputs[1:]):
                stack.extend((result, moved(node, result, own)) for result in node.outputs)
            elif node.op in ("Mul", "Div") and any(scalar(t) is not None for t in node.inputs):
                stack.append((node.outputs[0], own))
            else:
                return False
    return True


def check_private(graph: Graph, attention: Values, letters: str) -> None:
    """See that the features of some operands can be rewritten without anything but this attention noticing.

    Args:
        graph: the graph, to know its outputs.
        attention: a block, decomposed or fused, or the half of one that holds these operands.
        letters: of ``qkv``, the operands to rewrite together.

    Raises:
        MatchFailure: another operand is made of the same features, or something else reads them or the merged heads.
    """
    views = attention.views
    for letter, other in product(letters, views):
        one, two = views[letter], views[other]
        if letter != other and one.linear.matmul is two.linear.matmul and np.intersect1d(one.columns, two.columns).size:
            raise MatchFailure(f"{other} is made of the same features as {letter}", one.linear.name)
    for letter in letters:
        linear = views[letter].linear
        if np.unique(views[letter].columns).size < views[letter].columns.size:
            raise MatchFailure(f"several heads of {letter} are made of the same features", linear.name)
        if not _ends_in(graph, views[letter], attention.ends[letter]):
            raise MatchFailure(f"{linear.name} is read by more than this attention", linear.name)
    tensor = attention.proj.input
    while "v" in letters and (node := producer(tensor)) is not None:
        if graph.is_output(tensor):
            raise MatchFailure(f"{tensor.name} is a graph output", tensor.name)
        if node is attention.context or node is attention.fused:
            break
        tensor = node.inputs[0]


def map_heads(view: HeadView, matrices: NDArray[np.float64]) -> None:
    """h -> h R for every head, R = ``matrices`` [heads, head_dim, head_dim]: features W R, bias c R."""
    for tensor in (view.linear.weight, view.linear.bias):
        if tensor is not None:
            new = value(tensor).astype(np.float64)
            heads = new[..., view.columns].reshape(-1, *matrices.shape[:2]).swapaxes(0, 1)
            new[..., view.columns] = (heads @ matrices).swapaxes(0, 1).reshape(*new.shape[:-1], -1)
            tensor.values = new.astype(np.float32)


def map_merged_heads(proj: Linear, matrices: NDArray[np.float64]) -> None:
    """Let ``proj`` read h R for every head and give what it gave: R^-1 W."""
    weight = value(proj.weight).astype(np.float64)
    heads = weight.reshape(*matrices.shape[:2], -1)
    proj.weight.values = np.linalg.solve(matrices, heads).reshape(weight.shape).astype(np.float32)


def scale_features(view: HeadView, factor: NDArray[Any]) -> None:
    """h -> h * factor, one number for each of the features of ``view``."""
    factors = np.ones(view.linear.out_features)
    factors[view.columns] = factor
    for tensor in (view.linear.weight, view.linear.bias):
        if tensor is not None:
            tensor.values = (value(tensor) * factors).astype(np.float32)


def shift_features(graph: Graph, view: HeadView, offset: NDArray[Any]) -> None:
    """h -> h + offset, one number for each of the features of ``view``."""
    offsets = np.zeros(view.linear.out_features)
    offsets[view.columns] = offset
    add_to_bias(graph, view.linear, offsets)
