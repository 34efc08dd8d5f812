"""Hand the quantized graph to the target, which gives it the form it runs fastest; then the lowest opset, and a check."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from vitq_compiler.lint.rule import WARNING
from vitq_compiler.opset import lower_opset, lowest_opset
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
        changes += lower_opset(c.graph, lowest_opset(c.graph))
        findings = [finding for finding in c.target.check(c.graph) if finding.severity is WARNING]
        for _, group in groupby(findings, key=lambda finding: finding.rule.id):
            first, *others = group
            c.warnings.append(f"{first}{f' (and {len(others)} more)' if others else ''}")
        return changes
