"""The scale of attention into the Linear layer of the queries.

    softmax(s q k') with q = x W + c  ->  softmax(q' k') with q' = x (s W) + s c

Wherever the exporter put the factor or its root: on q, on k, on both, or on the scores. One operation less for each, and q
enters the product with the range that is quantized.

Precondition: q is read by this attention alone, and so is whatever is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, feeds_only, is_product, scale_features
from vitq_compiler.graph import Graph, Node, Tensor, producer, scalar, unique
from vitq_compiler.passes._heads import private, queries_and_keys
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.views import VIEWS

STAYS = "the scale of attention stays"


@dataclass(frozen=True)
class FoldAttentionScale(Pass):
    """softmax(s q k') -> softmax((s q) k')"""

    name = "fold-attention-scale"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        scaled = [attention for attention in queries_and_keys(self, c, STAYS) if attention.scale != 1]
        for attention in private(self, c, scaled, "q", STAYS):
            try:
                _fold(c.graph, attention)
                changes += 1
            except MatchFailure as failure:
                self.note(c, attention.proj.block, f"{STAYS}: {failure.reason}")
        c.graph.clean()
        return changes


def _fold(graph: Graph, attention: Attention) -> None:
    if attention.fused is not None:
        attention.fused.attrs["scale"] = 1.0
    else:
        scalings = unique(node for tensor in (*attention.scores.inputs, attention.softmax.inputs[0]) for node in _scalings(tensor))
        for node in scalings:
            result = node.outputs[0]
            if graph.is_output(result) or not (is_product(result) or feeds_only(graph, result, attention)):
                raise MatchFailure(f"{node.op} {node.name} scales more than this attention", node.name)
            if is_product(result) and len(result.outputs) > 1:
                raise MatchFailure(f"the scores {result.name} are read by more than softmax", node.name)
        for node in scalings:
            graph.replace(node.outputs[0], next(t for t in node.inputs if scalar(t) is None))
    scale_features(attention.q, np.array(attention.scale))
    attention.scale = 1.0


def _scalings(tensor: Tensor) -> list[Node]:
    """The multiplications by a number between ``tensor`` and the product or Linear that it comes from, past a mask."""
    found = []
    while (node := producer(tensor)) is not None:
        if node.op in ("Mul", "Div") and any(scalar(t) is not None for t in node.inputs):
            found.append(node)
            tensor = next(t for t in node.inputs if scalar(t) is None)
        elif node.op == "Add" and any(map(is_product, node.inputs)):
            tensor = next(filter(is_product, node.inputs))
        elif node.op in VIEWS:
            tensor = node.inputs[0]
        else:
            break
    return found
