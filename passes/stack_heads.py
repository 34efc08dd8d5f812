"""q, k and v as one stack of heads.

    q, k, v from one Linear or three, split in any way  ->  Split(Transpose(Reshape(x [s Wq, Wk, Wv])), axis=heads)

The heads of q, k and v lie side by side on one axis of [batch, 3 heads, tokens, head_dim], and the scale s of the scores goes
into the weight of q. TensorRT then merges bias, Reshape, Transpose and Split into one kernel, and sees the bare
softmax(q k^T) v that it fuses; three operands that are moved one by one cost two more kernels in every block, and a split of
the features makes it dequantize the weight.

A block whose scores are regrouped before the softmax (the masked windows of Swin) is stacked too; there only the scale on q
and k goes into the weight.

Precondition: q, k and v come from the same tokens, are equally wide, and nothing else reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, HeadView, Values, feeds_only, query_and_key, value_view
from vitq_compiler.blocks.computed_attention import ComputedAttention
from vitq_compiler.blocks.linear import Linear, add_to_bias
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, readers, value
from vitq_compiler.passes._own_linears import unscale
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.views import VIEWS


@dataclass(frozen=True)
class StackHeads(Pass):
    """softmax(s q k^T) v, q, k, v split in any way -> q, k, v = Split(heads of x [s Wq, Wk, Wv])"""

    name = "stack-heads"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for attention in c.annotations.attentions:
            try:
                self._check(c.graph, attention)
            except MatchFailure as failure:
                self.note(c, attention.softmax.name, f"heads are not stacked: {failure.reason}")
                continue
            _stack(c, attention)
            unscale(c.graph, attention)
            changes += 1
        for computed in c.annotations.computed_attentions:
            try:
                attention = _regrouped(computed, c.annotations.linears)
                self._check(c.graph, attention)
            except MatchFailure as failure:
                self.note(c, computed.softmax.name, f"heads are not stacked: {failure.reason}")
                continue
            _stack(c, attention)
            computed.linears[:] = attention.linears
            if isinstance(computed.values, Values):
                computed.values.v = attention.v
            changes += 1
        c.graph.clean().infer_shapes()
        return changes

    def _check(self, graph: Graph, attention: Attention) -> None:
        first, *others = attention.linears
        if any(linear.input is not first.input for linear in others):
            raise MatchFailure("queries, keys and values are made of different tokens")
        shape, operand = list(first.output.shape or ()), list(attention.scores.inputs[0].shape or ())
        if len(shape) != 3 or len(operand) != 4:
            raise MatchFailure(f"its operands have {len(operand)} axes, and their Linear {len(shape)}")
        if not isinstance(shape[1], int):
            raise MatchFailure("the number of tokens is open")
        if len({len(view.columns) for view in (attention.q, attention.k, attention.v)}) > 1:
            raise MatchFailure("queries, keys and values are not equally wide")
        if any(not feeds_only(graph, linear.output, attention) for linear in attention.linears):
            raise MatchFailure("a Linear of queries, keys and values is read by more than this attention")
        if any(graph.is_output(t) for t in (attention.scores.outputs[0], attention.scores.inputs[0], attention.scores.inputs[1])):
            raise MatchFailure("the scores or their operands are graph outputs")


def _stack(c: Compilation, attention: Attention) -> None:
    graph = c.graph
    views = (attention.q, attention.k, attention.v)
    scales = (attention.scale, 1.0, 1.0)
    weight = np.concatenate([value(v.linear.weight)[:, v.columns] * np.float32(s) for v, s in zip(views, scales, strict=True)], 1)
    bias = np.concatenate([_bias(v) * np.float32(s) for v, s in zip(views, scales, strict=True)])
    linear, *merged = attention.linears
    linear.weight.values = weight
    linear.out_features = weight.shape[1]
    if linear.bias is not None:
        linear.bias.values = bias
    elif any(v.linear.bias is not None for v in views):
        add_to_bias(graph, linear, bias)
    for other in merged:
        linear.layers += other.layers
        c.annotations.linears.remove(other)
        c.move_specs(other.name, [linear.name])
    for tensor in {id(t): t for t in (linear.matmul.outputs[0], linear.output)}.values():
        tensor.shape = [*tensor.shape[:-1], linear.out_features]
    q, k, v = _operands(graph, attention, linear.output)
    attention.scores.inputs[0], attention.scores.inputs[1] = q, k
    attention.context.inputs[1] = v
    features = linear.out_features // 3
    for index, letter in enumerate("qkv"):
        setattr(attention, letter, HeadView(linear, np.arange(index * features, (index + 1) * features)))
    attention.scale = 1.0


def _regrouped(computed: ComputedAttention, linears: list[Linear]) -> Attention:
    """The block as if its scores went straight into the softmax; its scale is that of q and k alone.

    Raises:
        MatchFailure: between softmax and products lies more than views, scalings and masks.
    """
    if computed.mixers:
        raise MatchFailure("its heads are mixed")
    node: Node | None = computed.softmax
    while node is not None and node.op in VIEWS | {"Softmax", "Mul", "Div", "Add"}:
        node = next((p for t in node.inputs if (p := producer(t)) is not None), None)
    following = readers(computed.softmax.outputs[0])
    while len(following) == 1 and following[0].op in VIEWS:
        following = readers(following[0].outputs[0])
    if node is None or node.op != "MatMul" or is_constant(node.inputs[1]) or len(following) != 1 or following[0].op != "MatMul":
        raise MatchFailure(computed.reason)
    q, k, scale = query_and_key(node, linears)
    v = value_view(following[0], linears)
    heads = int(node.outputs[0].shape[1])
    products = {"scores": node, "softmax": computed.softmax, "context": following[0]}
    return Attention(q=q, k=k, v=v, **products, proj=computed.proj, mask=None, heads=heads, scale=scale)


def _bias(view: HeadView) -> np.ndarray:
    bias = view.linear.bias
    return np.zeros(len(view.columns), np.float32) if bias is None else value(bias)[view.columns]


def _operands(graph: Graph, attention: Attention, stacked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [batch, heads, tokens, head_dim], k transposed, and v."""
    batch, tokens, features = stacked.shape
    heads, name = attention.heads, attention.softmax.name
    size = features // (3 * heads)

    def move(op: str, inputs: list[Tensor], suffix: str, shape: list[object], **attributes: object) -> Tensor:
        result = graph.insert(op, inputs, name=f"{name}/{suffix}", like=stacked, **attributes)
        result.shape = shape
        return result

    target = graph.constant(f"{name}/heads", np.array([-1, tokens, 3 * heads, size], np.int64))
    split = move("Reshape", [stacked, target], "split_heads", [batch, tokens, 3 * heads, size])
    stack = move("Transpose", [split], "stack", [batch, 3 * heads, tokens, size], perm=[0, 2, 1, 3])
    sizes = graph.constant(f"{name}/sizes", np.array([heads] * 3, np.int64))
    q, k, v = graph.add("Split", [stack, sizes], name=f"{name}/split", outputs=3, axis=1)
    for tensor in (q, k, v):
        tensor.dtype, tensor.shape = stacked.dtype, [batch, heads, tokens, size]
    return q, move("Transpose", [k], "transposed_keys", [batch, heads, size, tokens], perm=[0, 1, 3, 2]), v
