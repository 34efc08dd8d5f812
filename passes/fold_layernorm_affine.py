"""Scale and shift of a LayerNormalization into the Linear layers that read it.

    LN(u; g, b) W + c  ->  LN(u; 1, 0) (diag(g) W) + (c + b W)

What is left normalizes and does nothing else, so that a rotation of the residual stream passes through it. A reader may see
several tokens side by side (patch merging): g and b are then repeated. RMSNormalization has no b.

Precondition: Linear layers read the output, directly or through layout operations and means of tokens, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.blocks.residual import fold_affine, only_normalizes
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
            if only_normalizes(node):
                continue
            try:
                fold_affine(c.graph, node, c.annotations.linears)
                changes += 1
            except MatchFailure as failure:
                self.note(c, node.name, f"{node.op} keeps its scale and shift: {failure.reason}")
        return changes
