"""The graph in the words of its target, before it is quantized.

Operators that came after the newest opset that the target takes become others, see `vitq_compiler.decompositions`. What is done
later needs no more than that, and at the end the graph gets the lowest opset that is left in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.pipeline import Compilation, Pass


@dataclass(frozen=True)
class LowerOpset(Pass):
    """RMSNormalization, Swish, Gelu, ... -> operators of the target's opset"""

    name = "lower-opset"
    exact = True

    def run(self, c: Compilation) -> int:
        changes = c.target.lower_opset(c)
        c.graph.clean().infer_shapes()
        return changes
