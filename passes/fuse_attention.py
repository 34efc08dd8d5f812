"""Attention in one operator.

    softmax(scale * q k^T + mask) v, q, k, v split from Linear layers by views  ->  Attention(q, k, v; heads, scale)

The output features of the Linear layers are put in the order q, k, v, head by head, by permuting weight columns, so that
q, k and v are consecutive slices and no Transpose is left (ONNX Attention, opset 23). Where the runtime has no such
operator the graph stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, feeds_only
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
                _fuse(c.graph, attention)
                changes += 1
            except MatchFailure as failure:
                self.note(c, attention.softmax.name, f"attention kept decomposed: {failure.reason}")
        c.graph.clean().infer_shapes()
        return changes


def _fuse(graph: Graph, attention: Attention) -> None:
    mask = [] if attention.mask is None else [_mask(graph, attention, attention.mask)]
    operands = [*_operands(graph, attention), *mask]
    output = graph.insert(
        "Attention",
        operands,
        name=f"{attention.softmax.name}/attention",
        like=attention.proj.input,
        q_num_heads=attention.heads,
        kv_num_heads=attention.heads,
        scale=float(attention.scale),
    )
    attention.proj.matmul.inputs[0] = output
    attention.fused = output.inputs[0]


def _mask(graph: Graph, attention: Attention, mask: Tensor) -> Tensor:
    """The mask with its last two axes as long as queries and keys: ONNX Runtime broadcasts only the axes before them."""
    tokens = list(attention.scores.outputs[0].shape[-2:])
    if is_constant(mask) and all(isinstance(size, int) for size in tokens) and value(mask).ndim <= 4:
        spread = np.broadcast_to(value(mask), (*value(mask).shape[:-2], *tokens))
        return graph.constant(f"{mask.name}/spread", spread)
    if len(mask.shape or ()) not in (2, 3, 4) or list(mask.shape[-2:]) != tokens:
        raise MatchFailure(f"its mask of shape {mask.shape} is not one number for each of {tokens} queries and keys", mask.name)
    return mask


def _operands(graph: Graph, attention: Attention) -> list[Tensor]:
    views = (attention.q, attention.k, attention.v)
    found: dict[int, Tensor] = {}
    for linear in attention.linears:
        mine = [view for view in views if view.linear.matmul is linear.matmul]
        columns = np.concatenate([view.columns for view in mine])
        if len(columns) != linear.out_features or len(np.unique(columns)) != len(columns):
            raise MatchFailure(f"{linear.name} has {linear.out_features} output features, of which {len(np.unique(columns))} are used")
        if not np.array_equal(columns, np.arange(len(columns))):
            if not feeds_only(graph, linear.output, attention):
                raise MatchFailure(f"{linear.name} is read by more than this attention, so its features cannot be reordered")
            linear.weight.values = value(linear.weight)[:, columns]
            if linear.bias is not None:
                linear.bias.values = value(linear.bias)[columns]
        ends = np.cumsum([len(view.columns) for view in mine])
        for view, end in zip(mine, ends, strict=True):
            view.columns = np.arange(end - len(view.columns), end)
        parts: list[Tensor] = [linear.output]
        if len(mine) > 1:
            sizes = graph.constant(f"{linear.name}/sizes", np.array([len(view.columns) for view in mine], np.int64))
            split = graph.add("Split", [linear.output, sizes], name=f"{linear.name}/split", outputs=len(mine), axis=-1)
            parts = split if isinstance(split, list) else [split]
        found.update({id(view): part for view, part in zip(mine, parts, strict=True)})
    return [found[id(view)] for view in views]
