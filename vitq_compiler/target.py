"""What a target is: a table of rules, two pipeline texts and a lowering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import Finding, Platform, Rule, check

if TYPE_CHECKING:
    from vitq_compiler.pipeline import Compilation


class Target(ABC):
    """A runtime or compiler that takes the integer graph.

    Attributes:
        name: as in ``--target``.
        opset: opset of the graph.
        ir_version: IR version of the file.
        rewrites: passes that shape the float graph for this target, before calibration.
        lowering: passes from quantization parameters to the final graph.
        rules: what a graph must satisfy, also one that another tool made; see `lint`.
        platform: the version and the GPU that the graph is for, where that matters.
        integer_kernels: op types of the runtime's optimized graph that compute on integers.
    """

    name: ClassVar[str]
    opset: ClassVar[int]
    ir_version: ClassVar[int]
    rewrites: ClassVar[str]
    lowering: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    platform: Platform = Platform()
    integer_kernels: ClassVar[frozenset[str]]

    @abstractmethod
    def lower(self, c: Compilation) -> int:
        """Rewrite the quantized graph into the form this target runs fastest; returns the number of changes."""

    def check(self, graph: Graph) -> list[Finding]:
        """Hold the graph against the rules; returns what is legal but could be better.

        Raises:
            TargetError: the target would refuse the graph, or mean something else by it.
        """
        proto, weights = graph.without_weights()
        findings = check(Model(proto, weights=weights), self.rules, self.platform)
        for finding in findings:
            if finding.severity.fails:
                raise TargetError(f"target {self.name}: {finding}")
        return findings
