"""A table of rules as a page of Markdown: ``python -m vitq_compiler.lint.document docs/tensorrt-rules.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vitq_compiler.lint import tensorrt
from vitq_compiler.lint.rule import Rule, Severity

HEAD = """# What TensorRT wants of a graph

`vitq-compile --check MODEL.onnx --target tensorrt` holds any ONNX file against these rules; `--trt-version` and
`--compute-capability` choose those that apply. This page is made from the table in `vitq_compiler/lint/tensorrt` by
`python -m vitq_compiler.lint.document docs/tensorrt-rules.md`.

| severity | meaning | exit code |
| --- | --- | --- |
| error | the parser or the builder rejects the graph | 3 |
| silent | it is accepted, but means something else than ONNX says, or than is documented | 3 |
| warning | it is accepted, and slower than it could be | 0 |
| information | good to know | 0 |
"""
TITLES = {"T": "Format", "S": "Speed"}


def page(rules: Sequence[Rule]) -> str:
    """The page."""
    lines = [HEAD]
    kind = ""
    for rule in rules:
        if rule.id[0] != kind:
            kind = rule.id[0]
            lines += [f"## {TITLES[kind]}", ""]
        lines += [f"### {rule.id}: {rule.title}", "", f"- {_severity(rule)}", f"- Why: {rule.reason}", f"- Do: {rule.remedy}"]
        lines += [f"- From: {rule.sources}"] * bool(rule.sources) + [""]
    return "\n".join(lines).rstrip() + "\n"


def _severity(rule: Rule) -> str:
    if rule.check is None:
        return "Not decided on the graph"
    versions = f", versions {' and '.join(rule.versions)} only" if rule.versions else ""
    others = "".join(f"; {severity.value} in {version}" for version, severity in rule.severity_in.items())
    return f"{Severity(rule.severity).value.capitalize()}{versions}{others}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(tensorrt.RULES), encoding="utf-8")
