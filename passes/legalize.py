"""Hand the quantized graph to the target, which rewrites what it cannot take and then checks every node."""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class Legalize(Pass):
    """quantized graph -> the form in which the target runs it fastest"""

    name = "legalize"
    requires = frozenset({Fact.QUANTIZED})
    provides = frozenset({Fact.LEGAL})

    def run(self, c: Compilation) -> int:
        changes = c.target.lower(c)
        c.graph.clean()
        c.target.check(c.graph)
        return changes
