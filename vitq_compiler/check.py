"""Hold any ONNX file against the rules of a target, without compiling it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from vitq_compiler.catalog import load_target
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.report import LintReport
from vitq_compiler.lint.rule import Platform
from vitq_compiler.lint.rule import check as find
from vitq_compiler.model_io import open_model


def check(model: Path, target: str = "onnxruntime", *, trt_version: str = "10", compute_capability: float | None = None) -> LintReport:
    """Every place where a file breaks a rule of a target.

    Args:
        model: the ONNX file, made by whatever tool; its weights are read only where a rule needs their numbers.
        target: name of a target.
        trt_version: of TensorRT: 8.6, 10 or 11; other targets have one version.
        compute_capability: of the GPU, such as 8.9; None leaves out what depends on it.

    Raises:
        ModelError: the file cannot be read.
        RecipeError: there is no such target.
    """
    rules = load_target(target).rules
    platform = Platform(trt_version, compute_capability) if any(rule.versions for rule in rules) else Platform()
    findings = find(Model(open_model(Path(model)), folder=Path(model).parent), rules, platform)
    return LintReport(version("vitq-compiler"), str(model), target, platform, rules, findings)
