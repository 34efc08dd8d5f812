"""Scale and shift of a LayerNormalization into the Linear layers that read it.

    LN(u; g, b) W + c  ->  LN(u; 1, 0) (diag(g) W) + (c + b W)

What is left normalizes and does nothing else, so that a rotation of the residual stream passes through it. A reader may see
several tokens side by side (patch merging): g and b are then repeated. RMSNormalization has no b.

Precondition: Linear layers read the output, directly or through layout operations and means of tokens, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import absorb
from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.blocks.residual import readers_of_norm
from vitq_compiler.graph import Node, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class FoldLayernormAffine(Pass):
    """LN(u; g, b) W + c -> LN(u; 1, 0) (diag(g) W) + (c + b W)"""

    name = "fold-layernorm-affine"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in c.graph.find(*NORMS):
            try:
                changes += _fold(c, node)
            except MatchFailure as failure:
                self.note(c, node.name, f"{node.op} keeps its scale and shift: {failure.reason}")
        return changes


def _fold(c: Compilation, node: Node) -> int:
    gamma = value(node.inputs[1])
    beta = value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(gamma)
    if (gamma == 1).all() and not beta.any():
        return 0
    for linear in readers_of_norm(c.graph, node, c.annotations.linears):
        copies = linear.in_features // len(gamma)
        absorb(c.graph, linear, -np.tile(beta, copies), np.tile(gamma, copies))
    node.inputs[1].values = np.ones_like(gamma)
    if len(node.inputs) > 2:
        node.inputs[2].values = np.zeros_like(beta)
    return 1
