"""What a rule is, what it finds, and how a table of them is run.

check(model, rules, platform) = every rule of the table that holds for the platform and is broken somewhere, place by place
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from vitq_compiler.lint.model import Model, Node


class Severity(Enum):
    """What a broken rule means, worst first."""

    ERROR = "error"  # the target rejects the graph
    SILENT = "silent"  # the target takes it, but means something else than ONNX does
    WARNING = "warning"  # the target takes it, and runs it slower than it could
    INFORMATION = "information"  # good to know

    @property
    def fails(self) -> bool:
        """Whether such a graph should not be shipped."""
        return self in (Severity.ERROR, Severity.SILENT)


ERROR, SILENT, WARNING, INFORMATION = Severity


@dataclass(frozen=True)
class Platform:
    """What a graph is for.

    Attributes:
        version: of the target; None where it has only one.
        compute_capability: of the GPU, such as 8.9; None where it is not known, and then nothing is said about it.
        cpu: kind of CPU, for targets that run on one; ``any`` includes the oldest.
    """

    version: str | None = None
    compute_capability: float | None = None
    cpu: str = "any"


class Fault(NamedTuple):
    """One place where a rule is broken; the graph as a whole where ``node`` is None.

    Attributes:
        node: the place.
        detail: what is there, in a few words.
        severity: where it is not that of the rule.
    """

    node: Node | None
    detail: str
    severity: Severity | None = None


Check = Callable[[Model, Platform], Iterable[Fault]]


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
        id: short and stable.
        severity: what it means when it is broken.
        title: what must hold.
        reason: what happens where it does not.
        remedy: what to do about it.
        check: finds the faults; None where the graph cannot tell, and then ``reason`` says why not.
        sources: where it is known from.
        versions: versions of the target that it holds for; empty: all.
        severity_in: severities that differ in a version.
    """

    id: str
    severity: Severity
    title: str
    reason: str
    remedy: str
    check: Check | None
    sources: str = ""
    versions: tuple[str, ...] = ()
    severity_in: Mapping[str, Severity] = field(default_factory=dict)

    def applies(self, platform: Platform) -> bool:
        """Whether it can be decided on a graph, and holds for that platform."""
        return self.check is not None and (not self.versions or platform.version is None or platform.version in self.versions)

    def severity_for(self, platform: Platform) -> Severity:
        """Its severity on that platform."""
        return self.severity_in.get(platform.version or "", self.severity)


@dataclass(frozen=True)
class Finding:
    """One broken rule at one place.

    Attributes:
        rule: the rule.
        severity: its severity there.
        op, node: operator and name of the node; both empty for the graph as a whole.
        detail: what is there.
    """

    rule: Rule
    severity: Severity
    op: str
    node: str
    detail: str

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.op} node {self.node}" if self.op else "the graph"

    def __str__(self) -> str:
        return f"{self.rule.id}: {self.where}: {self.detail}; {self.rule.remedy}"


def check(model: Model, rules: Sequence[Rule], platform: Platform) -> list[Finding]:
    """Every broken rule, worst severity first, then in the order of the table and of the nodes."""
    found = []
    for row, rule in enumerate(rules):
        if rule.check is None or not rule.applies(platform):
            continue
        for fault in rule.check(model, platform):
            severity = fault.severity or rule.severity_for(platform)
            place = fault.node.position if fault.node is not None else -1
            op, name = (fault.node.op, fault.node.label) if fault.node is not None else ("", "")
            found.append(((list(Severity).index(severity), row, place), Finding(rule, severity, op, name, fault.detail)))
    return [finding for _, finding in sorted(found, key=lambda item: item[0])]
