"""What the linter says of one file: as text, as JSON, and as SARIF for the tools that show findings beside code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vitq_compiler.judge import Verdict
from vitq_compiler.lint.rule import Finding, Platform, Rule, Severity
from vitq_compiler.text import printable

FIRST = 5  # places shown of one rule unless all are asked for
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
SARIF_LEVEL = {Severity.ERROR: "error", Severity.SILENT: "error", Severity.WARNING: "warning", Severity.INFORMATION: "note"}


@dataclass(frozen=True)
class LintReport:
    """The findings of one file.

    Attributes:
        version: of vitq.
        model: the file.
        target: name of the target.
        platform: what it was checked for.
        rules: the table of the target, with the rules that were not checked.
        findings: worst first.
        verdict: of NVIDIA's compiler, where it was asked.
        hint: why it could not be asked.
        saturated_db: where products of codes can saturate: SQNR, on built-in samples, of the results with saturation for those without.
    """

    version: str
    model: str
    target: str
    platform: Platform
    rules: Sequence[Rule]
    findings: Sequence[Finding]
    verdict: Verdict | None = None
    hint: str = ""
    saturated_db: float | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is rejected or misunderstood."""
        return not any(finding.severity.fails for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """How many findings are of that severity."""
        return sum(finding.severity is severity for finding in self.findings)

    def to_text(self, every: bool = False) -> str:
        """For people: findings by rule, the first places of each or ``every`` one; a verdict last."""
        lines = []
        for (rule, severity), group in groupby(self.findings, key=lambda finding: (finding.rule, finding.severity)):
            found = list(group)
            shown = found if every else found[:FIRST]
            lines += [f"{severity.value} {rule.id}: {rule.title} ({_count(len(found), 'place')})"]
            lines += [f"  {finding.where}: {finding.detail}" for finding in shown]
            lines += [f"  and {len(found) - len(shown)} more; -v shows all"] * (len(found) > len(shown))
            lines += [f"  why: {rule.reason}", f"  do: {rule.remedy}", ""]
        lines += [str(self.verdict)] * (self.verdict is not None) + [f"not judged: {self.hint}"] * bool(self.hint)
        if self.saturated_db is not None:
            lines.append(f"on x86 CPUs without VNNI the results lie {self.saturated_db:.1f} dB from those of other CPUs (built-in samples)")
        checked = _count(sum(rule.applies(self.platform) for rule in self.rules), "rule")
        counts = ", ".join(_count(self.count(severity), severity.value) for severity in Severity if self.count(severity))
        lines.append(f"{self.model}: {counts or 'nothing found'}; {checked} of {self._what()} checked")
        return "\n".join(map(printable, lines)) + "\n"

    def to_json(self, every: bool = True) -> str:
        """Everything as data."""
        content = {
            "version": self.version,
            "model": self.model,
            "target": self.target,
            "target_version": self.platform.version,
            "compute_capability": self.platform.compute_capability,
            "passed": self.passed,
            "counts": {severity.value: self.count(severity) for severity in Severity},
            "checked": [rule.id for rule in self.rules if rule.applies(self.platform)],
            "not_checked": [rule.id for rule in self.rules if not rule.applies(self.platform)],
            "findings": [
                {
                    "rule": finding.rule.id,
                    "severity": finding.severity.value,
                    "title": finding.rule.title,
                    "op": finding.op,
                    "node": finding.node,
                    "detail": finding.detail,
                    "reason": finding.rule.reason,
                    "remedy": finding.rule.remedy,
                }
                for finding in self.findings
            ],
        }
        if self.saturated_db is not None:
            content["saturated_db"] = self.saturated_db
        if self.verdict is not None:
            content["compiler"] = self.verdict.as_dict()
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def to_sarif(self, every: bool = True) -> str:
        """A log in SARIF 2.1.0 (OASIS); a node is a logical location in the file."""
        applied = [rule for rule in self.rules if rule.applies(self.platform)]
        place = {rule.id: index for index, rule in enumerate(applied)}
        driver = {"name": "vitq", "version": self.version, "rules": [_descriptor(rule, self.platform) for rule in applied]}
        results = [_result(finding, place[finding.rule.id], self.model) for finding in self.findings]
        run: dict[str, Any] = {"tool": {"driver": driver}, "automationDetails": {"id": f"{self._what()}/"}, "results": results}
        if self.verdict is not None:
            run["properties"] = {"compiler": self.verdict.as_dict()}
        return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False) + "\n"

    def _what(self) -> str:
        return f"{self.target} {self.platform.version}" if self.platform.version else self.target


FORMATS: dict[str, Callable[[LintReport, bool], str]] = {
    "text": LintReport.to_text,
    "json": LintReport.to_json,
    "sarif": LintReport.to_sarif,
}


def _descriptor(rule: Rule, platform: Platform) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.reason},
        "help": {"text": rule.remedy},
        "defaultConfiguration": {"level": SARIF_LEVEL[rule.severity_for(platform)]},
        "properties": {"severity": rule.severity_for(platform).value, "sources": rule.sources},
    }


def _result(finding: Finding, index: int, model: str) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(model)}}}
    if finding.op:
        location["logicalLocations"] = [{"name": finding.node, "kind": "element", "decoratedName": f"{finding.op} {finding.node}"}]
    return {
        "ruleId": finding.rule.id,
        "ruleIndex": index,
        "level": SARIF_LEVEL[finding.severity],
        "message": {"text": f"{finding.where}: {finding.detail}; {finding.rule.remedy}"},
        "locations": [location],
        "properties": {"severity": finding.severity.value},
    }


def _uri(path: str) -> str:
    from urllib.parse import quote

    return quote(path.replace("\\", "/"))


def _count(number: int, thing: str) -> str:
    plural = thing if thing in ("silent", "information") or number == 1 else f"{thing}s"
    return f"{number} {plural}"
