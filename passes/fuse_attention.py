"""Attention in one operator.

    softmax(scale * q k^T + mask) v, q, k, v split from Linear layers by views  ->  Attention(q, k, v; heads, scale)

A Linear that gives more than one of q, k, v, or gives their heads interleaved, is taken apart by weight columns into one
Linear for each: then no Split and no Transpose is left (ONNX Attention, opset 23). Where the installed runtime has no such
operator, or lacks another of the graph at that opset, or the installed onnx ends before that opset, the graph stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from vitq_compiler.blocks.attention import Attention
from vitq_compiler.graph import Graph, Tensor, is_constant, value
from vitq_compiler.opset import raise_opset
from vitq_compiler.passes._own_linears import own_linears
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.releases import requirement
from vitq_compiler.runtime import INSTALLED

OPSET = 23


@dataclass(frozen=True)
class FuseAttention(Pass):
    """softmax(s q k^T) v -> Attention(q, k, v)"""

    name = "fuse-attention"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        needs = requirement(c.graph.without_weights()[0], opset=max(OPSET, c.graph.opset), more=("Attention", "QuantizeLinear"))
        if not needs.met_by(INSTALLED):
            self.note(c, "attention", f"kept decomposed: the graph would need a newer onnxruntime than the installed one: {needs.reason}")
            return 0
        if (newest := onnx.defs.onnx_opset_version()) < OPSET:
            self.note(c, "attention", f"kept decomposed: the installed onnx {onnx.__version__} ends at opset {newest}, {OPSET} is needed")
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
        if changes:
            raise_opset(c.graph, OPSET)
        c.graph.clean().infer_shapes()
        return changes


def _fuse(c: Compilation, attention: Attention) -> None:
    if any(edge in c.specs for edge in attention.edges.values()):
        raise MatchFailure("its products are to be quantized")
    for tensor in (attention.scores.outputs[0], attention.softmax.outputs[0], attention.context.outputs[0], attention.proj.input):
        if c.graph.is_output(tensor):
            raise MatchFailure(f"{tensor.name} is a graph output", tensor.name)
    mask = [] if attention.mask is None else [_mask(c.graph, attention, attention.mask)]
    operands = [*(_as_tokens(c.graph, tensor) for tensor in own_linears(c, attention)), *mask]
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
