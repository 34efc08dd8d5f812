"""Attention in one operator.

    softmax(scale * q k^T + mask) v, q, k, v split from Linear layers by views  ->  Attention(q, k, v; heads, scale)

A Linear that gives more than one of q, k, v, or gives their heads interleaved, is taken apart by weight columns into one
Linear for each: then no Split and no Transpose is left (ONNX Attention, opset 23). Where the runtime has no such operator
the graph stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, HeadView, feeds_only
from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Tensor, is_constant, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.runtime import supports

OPSET = 23


@dataclass(frozen=True)
class FuseAttention(Pass):
    """softmax(s q k^T) v -> Attention(q, k, v)"""

    name = "fuse-attention"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        if not supports("Attention", OPSET):
            self.note(c, "attention", "the installed onnxruntime has no Attention operator: kept decomposed")
            c.warnings.append(
                "the installed onnxruntime has no Attention operator (opset 23); attention stays decomposed and a little slower"
            )
            return 0
        changes = 0
        for attention in c.annotations.attentions:
            try:
                _fuse(c, attention)
                changes += 1
            except MatchFailure as failure:
                self.note(c, attention.softmax.name, f"attention kept decomposed: {failure.reason}")
        for computed in c.annotations.computed_attentions:
            self.note(c, computed.softmax.name, f"attention kept decomposed: {computed.reason}")
        c.graph.clean().infer_shapes()
        return changes


def _fuse(c: Compilation, attention: Attention) -> None:
    if any(edge in c.specs for edge in attention.edges.values()):
        raise MatchFailure("its products are to be quantized")
    for tensor in (attention.scores.outputs[0], attention.softmax.outputs[0], attention.context.outputs[0], attention.proj.input):
        if c.graph.is_output(tensor):
            raise MatchFailure(f"{tensor.name} is a graph output", tensor.name)
    mask = [] if attention.mask is None else [_mask(c.graph, attention, attention.mask)]
    operands = [*_operands(c, attention), *mask]
    merged = attention.proj.input
    output = c.graph.insert(
        "Attention",
        operands,
        name=f"{attention.softmax.name}/attention",
        like=merged,
        q_num_heads=attention.heads,
        kv_num_heads=attention.heads,
        scale=float(attention.scale),
    )
    attention.fused = output.inputs[0]
    if len(merged.shape) > 3:
        shape = c.graph.constant(f"{output.name}/shape", np.array([-1, *merged.shape[1:]], np.int64))
        output.shape = [merged.shape[0], *operands[0].shape[1:-1], merged.shape[-1]]
        output = c.graph.insert("Reshape", [output, shape], name=f"{output.name}/image", like=merged)
    attention.proj.matmul.inputs[0] = output


def _as_tokens(graph: Graph, tensor: Tensor) -> Tensor:
    """An operand with all axes between batch and features as one, be there several or, for a single token, none."""
    if len(tensor.shape) == 3:
        return tensor
    count = int(np.prod(tensor.shape[1:-1]))
    shape = graph.constant(f"{tensor.name}/sequence", np.array([-1, count, tensor.shape[-1]], np.int64))
    sequence = graph.insert("Reshape", [tensor, shape], name=f"{tensor.name}/sequence", like=tensor)
    sequence.shape = [tensor.shape[0], count, tensor.shape[-1]]
    return sequence


def _mask(graph: Graph, attention: Attention, mask: Tensor) -> Tensor:
    """The mask with its last two axes as long as queries and keys: ONNX Runtime broadcasts only the axes before them."""
    tokens = list(attention.scores.outputs[0].shape[-2:])
    if len(attention.scores.outputs[0].shape) == 3 and len(mask.shape or ()) > 2:
        raise MatchFailure("its mask may differ from head to head, and heads are counted into the batch", mask.name)
    if is_constant(mask) and all(isinstance(size, int) for size in tokens) and value(mask).ndim <= 4:
        spread = np.broadcast_to(value(mask), (*value(mask).shape[:-2], *tokens))
        return graph.constant(f"{mask.name}/spread", spread)
    if len(mask.shape or ()) not in (2, 3, 4) or list(mask.shape[-2:]) != tokens:
        raise MatchFailure(f"its mask of shape {mask.shape} is not one number for each of {tokens} queries and keys", mask.name)
    return mask


def _operands(c: Compilation, attention: Attention) -> list[Tensor]:
    """q, k and v, each of shape [batch, tokens, heads * head_dim] and the whole output of a Linear."""
    views = {"q": attention.q, "k": attention.k, "v": attention.v}
    for linear in attention.linears:
        mine = {letter: view for letter, view in views.items() if view.linear is linear}
        if len(mine) == 1 and all(np.array_equal(view.columns, np.arange(linear.out_features)) for view in mine.values()):
            continue
        if not feeds_only(c.graph, linear.output, attention):
            raise MatchFailure(f"{linear.name} is read by more than this attention, so its features cannot be taken apart")
        parts = [_part(c.graph, linear, view, f"{linear.name}/{letter}") for letter, view in mine.items()]
        c.move_specs(linear.name, [part.name for part in parts])
        place = c.annotations.linears.index(linear)
        c.annotations.linears[place : place + 1] = parts
    return [_as_tokens(c.graph, view.linear.output) for view in views.values()]


def _part(graph: Graph, linear: Linear, view: HeadView, name: str) -> Linear:
    """The output features of ``view`` as a Linear of their own, called ``name``."""
    weight = graph.constant(f"{linear.weight.name}/part", value(linear.weight)[:, view.columns])
    output = graph.insert("MatMul", [linear.input, weight], name=name)
    part = Linear(output.inputs[0], None, linear.role, linear.block)
    if linear.bias is not None:
        bias = graph.constant(f"{linear.bias.name}/part", value(linear.bias)[view.columns])
        output = graph.insert("Add", [output, bias], name=f"{name}/add")
        part.add = output.inputs[0]
    for tensor in (part.matmul.outputs[0], output):
        tensor.dtype, tensor.shape = linear.output.dtype, [*linear.output.shape[:-1], len(view.columns)]
    view.linear, view.columns = part, np.arange(len(view.columns))
    return part
