"""Fused operators of ONNX Runtime, domain ``com.microsoft``, as standard ones: one function per operator.

Each takes the graph and a node and returns what replaces the node's outputs (None for an output that nothing may read).
The definitions are those of onnxruntime's docs/ContribOperators.md. Only operators that its CPU can run
are here, as the result is held against the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vitq_compiler.decompositions import Writer, attend, merge_heads, split_heads
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, value
from vitq_compiler.pattern import MatchFailure

DOMAIN = "com.microsoft"
Shapes = dict[str, tuple[int, ...]]  # of activations, as observed in a run
Replacement = list[Tensor | None]
Unfuse = Callable[[Graph, Node, Shapes], Replacement]


def _given(node: Node, index: int) -> Tensor | None:
    """An optional input, where it is given."""
    return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None


def _refuse_inputs(node: Node, first: int, what: str) -> None:
    if any(_given(node, index) is not None for index in range(first, len(node.inputs))):
        raise MatchFailure(f"{what} cannot be written in standard operators", node.name)


def _sum(graph: Graph, node: Node, *tensors: Tensor | None) -> Tensor:
    """The given tensors added up from left to right."""
    first, *rest = [t for t in tensors if t is not None]
    for tensor in rest:
        first = graph.add("Add", [first, tensor], name=f"{node.name}/add")
    return first


def _gelu(approximate: str) -> Unfuse:
    def unfuse(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
        x = _sum(graph, node, node.inputs[0], _given(node, 1))
        return [graph.add("Gelu", [x], name=f"{node.name}/gelu", approximate=approximate)]

    return unfuse


def _quick_gelu(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    x = node.inputs[0]
    alpha = graph.constant(f"{node.name}/alpha", np.array(node.attrs.get("alpha", 1.702), np.float32))
    gate = graph.add("Sigmoid", [graph.add("Mul", [x, alpha], name=f"{node.name}/scaled")], name=f"{node.name}/sigmoid")
    return [graph.add("Mul", [x, gate], name=f"{node.name}/mul")]


def _layernorm(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    options = {"axis": node.attrs.get("axis", -1), "epsilon": node.attrs.get("epsilon", 1e-5)}
    return [graph.add("LayerNormalization", node.inputs, name=f"{node.name}/layernorm", **options)]


def _rmsnorm(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    options = {"axis": node.attrs.get("axis", -1), "epsilon": node.attrs.get("epsilon", 1e-5)}
    return [graph.add("RMSNormalization", node.inputs[:2], name=f"{node.name}/rmsnorm", **options)]


def _skip_layernorm(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    x, skip, *parameters = node.inputs
    total = _sum(graph, node, x, skip, _given(node, 4))
    parameters = [t for t in parameters[:2] if t.name]
    normal = graph.add(
        "LayerNormalization", [total, *parameters], name=f"{node.name}/layernorm", axis=-1, epsilon=node.attrs.get("epsilon", 1e-12)
    )
    return [normal, None, None, total]


def _skip_rmsnorm(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    x, skip, gamma = node.inputs[:3]
    total = _sum(graph, node, x, skip, _given(node, 3))
    normal = graph.add("RMSNormalization", [total, gamma], name=f"{node.name}/rmsnorm", axis=-1, epsilon=node.attrs.get("epsilon", 1e-12))
    return [normal, None, None, total]


def _fused_matmul(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        raise MatchFailure("its batch axes are transposed", node.name)
    operands = [
        _transposed(graph, node, t, shapes) if node.attrs.get(flag, 0) else t
        for t, flag in zip(node.inputs, ("transA", "transB"), strict=True)
    ]
    return [_scaled(graph, node, graph.add("MatMul", operands, name=f"{node.name}/matmul"), node.attrs.get("alpha", 1.0))]


def _transposed(graph: Graph, node: Node, tensor: Tensor, shapes: Shapes) -> Tensor:
    if is_constant(tensor):
        return graph.constant(f"{tensor.name}/transposed", value(tensor).swapaxes(-1, -2))
    rank = len(shapes[tensor.name])
    return graph.add("Transpose", [tensor], name=f"{node.name}/transpose", perm=[*range(rank - 2), rank - 1, rank - 2])


def _scaled(graph: Graph, node: Node, tensor: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return tensor
    return graph.add("Mul", [tensor, graph.constant(f"{node.name}/scale", np.array(factor, np.float32))], name=f"{node.name}/scaled")


ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh"})


def _activated(graph: Graph, node: Node, tensor: Tensor) -> Tensor:
    kind = str(node.attrs.get("activation", ""))
    if kind and kind not in ACTIVATIONS:
        raise MatchFailure(f"its activation {kind} is not one of {', '.join(sorted(ACTIVATIONS))}", node.name)
    return graph.add(kind, [tensor], name=f"{node.name}/activation") if kind else tensor


def _fused_gemm(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    options = {key: node.attrs[key] for key in ("alpha", "beta", "transA", "transB") if key in node.attrs}
    return [_activated(graph, node, graph.add("Gemm", node.inputs, name=f"{node.name}/gemm", **options))]


def _fused_conv(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    options = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    convolved = graph.add("Conv", [t for t in node.inputs[:3] if t.name], name=f"{node.name}/conv", **options)
    return [_activated(graph, node, _sum(graph, node, convolved, _given(node, 3)))]


def _attention(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    """One Linear for q, k and v, and attention on its parts."""
    x, weight = node.inputs[:2]
    if not is_constant(weight) or node.attrs.get("do_rotary", 0) or _given(node, 4) is not None:
        raise MatchFailure("it has computed weights, a rotary embedding or a cache", node.name)
    _refuse_inputs(node, 6, "a cache")
    width = value(weight).shape[1]
    sizes = [int(s) for s in node.attrs.get("qkv_hidden_sizes", [])] or [width // 3] * 3
    packed = _sum(graph, node, graph.add("MatMul", [x, weight], name=f"{node.name}/qkv"), _given(node, 2))
    lengths = graph.constant(f"{node.name}/sizes", np.array(sizes, np.int64))
    q, k, v = graph.add("Split", [packed, lengths], name=f"{node.name}/split", outputs=3, axis=-1)
    masks = [_padding_mask(graph, node, _given(node, 3), shapes), _given(node, 5)]
    return [_attend(graph, node, (q, k, v), sizes[0], masks), None]


def _multi_head_attention(graph: Graph, node: Node, shapes: Shapes) -> Replacement:
    """Attention on q, k and v of three axes, each with its part of the bias."""
    q, k, v = (_given(node, index) for index in range(3))
    if q is None or k is None or v is None or any(len(shapes[t.name]) != 3 for t in (q, k, v)):
        raise MatchFailure("q, k and v are not three tensors of three axes", node.name)
    _refuse_inputs(node, 6, "a cache")
    sizes = [shapes[t.name][-1] for t in (q, k, v)]
    bias = _given(node, 3)
    if bias is not None:
        if not is_constant(bias):
            raise MatchFailure("its bias is computed", node.name)
        parts = np.split(value(bias), np.cumsum(sizes)[:-1])
        q, k, v = (_sum(graph, node, t, graph.constant(f"{node.name}/bias", part)) for t, part in zip((q, k, v), parts, strict=True))
    masks = [_padding_mask(graph, node, _given(node, 4), shapes), _given(node, 5)]
    return [_attend(graph, node, (q, k, v), sizes[0], masks), None, None]


def _padding_mask(graph: Graph, node: Node, mask: Tensor | None, shapes: Shapes) -> Tensor | None:
    """1 for keys that count and 0 for others, [batch, keys] -> 0 and a large negative number, [batch, 1, 1, keys]."""
    if mask is None:
        return None
    shape = value(mask).shape if is_constant(mask) else shapes[mask.name]
    if len(shape) != 2:
        raise MatchFailure(f"its mask has shape {list(shape)}, not batch and keys", node.name)
    low = np.array(node.attrs.get("mask_filter_value", -10000.0), np.float32)
    axes = graph.constant(f"{node.name}/axes", np.array([1, 2], np.int64))
    kept = graph.add("Cast", [graph.add("Unsqueeze", [mask, axes], name=f"{node.name}/mask")], name=f"{node.name}/mask/float", to=1)
    one, scale = graph.constant(f"{node.name}/one", np.ones((), np.float32)), graph.constant(f"{node.name}/low", low)
    return graph.add("Mul", [graph.add("Sub", [one, kept], name=f"{node.name}/mask/left_out"), scale], name=f"{node.name}/mask/low")


def _attend(graph: Graph, node: Node, qkv: tuple[Tensor, Tensor, Tensor], width: int, masks: list[Tensor | None]) -> Tensor:
    """softmax(scale q k^T + masks) v for q, k, v [batch, tokens, heads * head_dim]."""
    w, heads = Writer(graph, node), int(node.attrs["num_heads"])
    operands = [split_heads(w, tensor, heads, transposed=place == 1) for place, tensor in enumerate(qkv)]
    causal = bool(node.attrs.get("unidirectional", 0))
    return merge_heads(w, attend(w, operands, width // heads, float(node.attrs.get("scale", 0.0)), masks, causal=causal))


UNFUSE: dict[str, Unfuse] = {
    "Attention": _attention,
    "BiasGelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu("none"),
    "LayerNormalization": _layernorm,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _rmsnorm,
    "SkipLayerNormalization": _skip_layernorm,
    "SkipSimplifiedLayerNormalization": _skip_rmsnorm,
}


def unfuse(graph: Graph, node: Node, shapes: dict[str, Any]) -> None:
    """Replace ``node``, one of `UNFUSE`, by simpler operators.

    Raises:
        MatchFailure: it does what standard operators cannot, or an output is read that they do not have.
    """
    used = [graph.is_output(t) or bool(t.outputs) for t in node.outputs]
    replacement = UNFUSE[node.op](graph, node, shapes)
    replacement += [None] * (len(used) - len(replacement))
    for old, new, is_used in zip(list(node.outputs), replacement, used, strict=False):
        if is_used and new is None:
            raise MatchFailure(f"its output {old.name} is read, which standard operators do not have", node.name)
        if is_used:
            graph.replace(old, new)
    graph.remove(node)
