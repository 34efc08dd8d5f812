"""q, k and v as heads of Linear layers of their own, in standard operators that every runtime has.

    softmax(s q k^T) v, q, k, v split in any way
    ->  q = Transpose(Reshape(x (s Wq))), k and v likewise;  softmax(q k^T) v

Each operand is one Linear output that is moved once, however the exporter has split it. Where the products are quantized, the
quantizer can stand right behind the Linear, whose kernel gives codes at once, and what is moved is a quarter as large; a Linear
of all three would have to give floats, for the operands have a scale each. The scale s of the scores goes into the weight of q.

Precondition: q, k and v are read by this attention alone, which is not one operator already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, check_private, scale_features
from vitq_compiler.graph import Graph, Tensor
from vitq_compiler.passes._own_linears import own_linears, unscale
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class SeparateHeads(Pass):
    """softmax(s q k^T) v -> softmax(q k^T) v, q, k, v = Transpose(Reshape(x Wq)), ..."""

    name = "separate-heads"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for attention in c.annotations.attentions:
            if attention.fused is not None:
                continue
            try:
                _separate(c, attention)
                changes += 1
            except MatchFailure as failure:
                self.note(c, attention.softmax.name, f"heads stay where they are: {failure.reason}")
        c.graph.clean().infer_shapes()
        return changes


def _separate(c: Compilation, attention: Attention) -> None:
    check_private(c.graph, attention, "qkv")
    operands = (attention.scores.inputs[0], attention.scores.inputs[1], attention.context.inputs[1])
    ranks = {len(tensor.shape or ()) for tensor in operands}
    if not ranks <= {3, 4}:
        raise MatchFailure("its operands have no axes of tokens and features, and of batch and heads in one or two")
    for linear in attention.linears:
        places = list(linear.output.shape or ())[1:-1]
        if not linear.output.shape or ((len(places) > 1 or 3 in ranks) and not all(isinstance(size, int) for size in places)):
            raise MatchFailure("the number of its tokens is open, and they lie in several axes or heads are counted into the batch")
    if any(c.graph.is_output(tensor) for tensor in (*operands, attention.scores.outputs[0])):
        raise MatchFailure("the scores or their operands are graph outputs")
    q, k, v = own_linears(c, attention)
    scale_features(attention.q, np.array(attention.scale))
    unscale(c.graph, attention)
    attention.scale = 1.0
    attention.scores.inputs[0] = _heads(c.graph, q, attention, "q", (0, 2, 1, 3), operands[0])
    attention.scores.inputs[1] = _heads(c.graph, k, attention, "k", (0, 2, 3, 1), operands[1])
    attention.context.inputs[1] = _heads(c.graph, v, attention, "v", (0, 2, 1, 3), operands[2])


def _heads(graph: Graph, tensor: Tensor, attention: Attention, letter: str, order: tuple[int, ...], like: Tensor) -> Tensor:
    """[batch, ..., features] as [batch, tokens, heads, head_dim], its axes in another order; batch and heads in one as in ``like``."""
    name, (batch, *places, features) = f"{attention.softmax.name}/{letter}", tensor.shape
    tokens = places[0] if len(places) == 1 else int(np.prod(places))
    split = [batch, tokens, attention.heads, features // attention.heads]
    target = [-1, *split[1:]] if isinstance(tokens, int) else [0, 0, *split[2:]]
    shape = graph.constant(f"{name}/heads", np.array(target, np.int64))
    heads = graph.insert("Reshape", [tensor, shape], name=f"{name}/split_heads", like=tensor)
    heads.shape = split
    moved = graph.insert("Transpose", [heads], name=f"{name}/heads", like=tensor, perm=list(order))
    moved.shape = [split[i] for i in order]
    if len(like.shape) == 4:
        return moved
    shape = graph.constant(f"{name}/matrices", np.array([-1, *moved.shape[2:]], np.int64))
    matrices = graph.insert("Reshape", [moved, shape], name=f"{name}/merge", like=like)
    matrices.shape = like.shape
    return matrices
