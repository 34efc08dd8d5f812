"""What a target is: a table of rules, two pipeline texts and a lowering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph, Node

if TYPE_CHECKING:
    from vitq_compiler.pipeline import Compilation


@dataclass(frozen=True)
class Rule:
    """What must hold for every node of type ``op``; ``reason`` says what goes wrong where it does not."""

    op: str
    holds: Callable[[Node], bool]
    reason: str


class Target(ABC):
    """A runtime or compiler that takes the integer graph.

    Attributes:
        name: as in ``--target``.
        opset: opset of the graph.
        ir_version: IR version of the file.
        rewrites: passes that shape the float graph for this target, before calibration.
        lowering: passes from quantization parameters to the final graph.
        rules: what every node must satisfy.
        integer_kernels: op types of the runtime's optimized graph that compute on integers.
    """

    name: ClassVar[str]
    opset: ClassVar[int]
    ir_version: ClassVar[int]
    rewrites: ClassVar[str]
    lowering: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    integer_kernels: ClassVar[frozenset[str]]

    @abstractmethod
    def lower(self, c: Compilation) -> int:
        """Rewrite the quantized graph into the form this target runs fastest; returns the number of changes."""

    def check(self, graph: Graph) -> None:
        """Hold every node against the rules.

        Raises:
            TargetError: one breaks a rule.
        """
        for rule in self.rules:
            for node in graph.find(rule.op):
                if not rule.holds(node):
                    raise TargetError(f"target {self.name}: {rule.op} node {node.name}: {rule.reason}")
