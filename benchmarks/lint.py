"""What the linter finds in graphs of other tools, how long it takes, and whether NVIDIA's own parser and builder agree.

The graphs are what ``onnxruntime.quantization`` makes of a model (`PEERS`); ranges do not matter to the linter, so two
built-in pictures calibrate. The last table holds every rule of TensorRT against TensorRT-RTX, where it is installed (no GPU is
needed), on the two graphs by which the tests know the rule: one that breaks it, and one that does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.models import obtain
from benchmarks.tables import Cell, Table, say

FLOAT_BIAS = {"QuantizeBias": False}
MATMULS = {"op_types_to_quantize": ["MatMul", "Gemm"]}
ONLY = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
# Name -> activation type, and what else is said to quantize_static.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "U8S8": ("QUInt8", {}),
    "S8S8": ("QInt8", {}),
    "S8S8 symmetric, float bias": ("QInt8", {"extra_options": {"ActivationSymmetric": True} | FLOAT_BIAS}),
    "the same, MatMul inputs only": ("QInt8", {"extra_options": {"ActivationSymmetric": True} | FLOAT_BIAS | ONLY} | MATMULS),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", action="append", metavar="NAME", help="a timm model or an ONNX file; repeatable [the shipped model]")
    parser.add_argument("--trt-version", choices=["8.6", "10", "11"], default="10", help="of TensorRT [10]")
    parser.add_argument("--no-agreement", action="store_true", help="leave NVIDIA's parser out")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model, and the agreement with NVIDIA's parser."""
    tables = [graphs_table(name, options.trt_version) for name in options.model or ["models/vit_tiny_cifar10.onnx"]]
    if not options.no_agreement:
        if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
            say("tensorrt_rtx_bindings is not installed: nothing to agree with")
        else:
            tables.append(agreement_table())
    return tables


def graphs_table(name: str, version: str) -> Table:
    """A model, and what other tools make of it."""
    from benchmarks import peers
    from vitq_compiler.lint.tensorrt import RULES

    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"{name}: export ...")
        model = obtain(name, "dynamo", folder)
        graphs = {"float": model}
        prepared = peers.prepare(model, folder / "prepared.onnx")
        feeds = peers.calibration_feeds(model, None, "imagenet", 2, 0)
        for index, (title, (kind, how)) in enumerate(PEERS.items()):
            say(f"{name}: {title} ...")
            graphs[title] = peers.quantize_as(kind, prepared, folder / f"{index}.onnx", feeds, **how)
        for title, path in graphs.items():
            seconds, findings = lint(path, version)
            severities = Counter(finding.severity.value for finding in findings)
            rules = Counter(finding.rule.id for finding in findings if finding.severity.value != "information")
            broken = ", ".join(f"{rule.id} {rules[rule.id]}" for rule in RULES if rules[rule.id])
            rows.append(
                (title, path.stat().st_size / 1e6, seconds, *(severities[s] for s in ("error", "silent", "warning")), broken or "none")
            )
    columns = ("graph", "MB", "seconds", "errors", "silent", "warnings", "broken rules and places")
    return Table(
        f"{Path(name).stem} against the rules of TensorRT {version}", columns, tuple(rows), formats={"MB": ".1f", "seconds": ".3f"}
    )


def lint(path: Path, version: str) -> tuple[float, list[Any]]:
    """Seconds and findings of one file, reading included."""
    from vitq_compiler.lint.model import Model
    from vitq_compiler.lint.rule import Platform, check
    from vitq_compiler.lint.tensorrt import RULES
    from vitq_compiler.model_io import open_model

    began = time.perf_counter()
    findings = check(Model(open_model(path), folder=path.parent), RULES, Platform(version))
    return time.perf_counter() - began, findings


def agreement_table() -> Table:
    """Rule by rule: does the linter find the violation, and what does TensorRT-RTX do with it?"""
    from tests.lint.cases import CASES
    from tests.lint.rtx import judge
    from vitq_compiler.lint.model import Model
    from vitq_compiler.lint.rule import ERROR, check
    from vitq_compiler.lint.tensorrt import RULES

    words = {"parse": "not parsed", "build": "not built", "ok": "accepted"}
    rows: list[tuple[Cell, ...]] = []
    agreed = 0
    for rule in RULES:
        if rule.id not in CASES:
            rows.append((rule.id, rule.severity.value, "not decided on the graph", "-", "-"))
            continue
        case = CASES[rule.id]
        broken, kept = (check(Model(model), RULES, case.platform) for model in (case.broken, case.kept))
        verdicts = judge(case.broken, case.platform.compute_capability or 8.9), judge(case.kept)
        found = any(f.rule is rule for f in broken) and not any(f.rule is rule for f in kept)
        severity = next((f.severity for f in broken if f.rule is rule), rule.severity).value
        refused = any(f.severity is ERROR for f in broken)
        agreed += found and verdicts[1] == "ok" and (refused or verdicts[0] == "ok")
        rows.append((rule.id, severity, "told apart" if found else "not told apart", words[verdicts[0]], words[verdicts[1]]))
    notes = (
        f"{agreed} of {len(CASES)} rules agree: the linter tells the two graphs apart, and whatever is refused has an error.",
        "Errors that RTX accepts are those of version 8.6 (T19, T23), of Enterprise documentation, or of larger graphs (T16).",
    )
    columns = ("rule", "severity", "linter", "TensorRT-RTX, violation", "TensorRT-RTX, other graph")
    return Table("The linter beside TensorRT-RTX", columns, tuple(rows), notes)
