"""Hold any ONNX file against the rules of a target, without compiling it; NVIDIA's compiler, where there is one, has a say too."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from vitq_compiler import judge, runtime
from vitq_compiler.catalog import load_target
from vitq_compiler.data import open_data
from vitq_compiler.errors import TargetError, VitqError
from vitq_compiler.graph import Graph
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.report import LintReport
from vitq_compiler.lint.rule import Fault, Platform, Rule, Severity
from vitq_compiler.lint.rule import check as find
from vitq_compiler.metrics import sqnr
from vitq_compiler.model_io import follow_links, open_model, parse_model
from vitq_compiler.model_source import ModelSource, find_model
from vitq_compiler.preprocess import resolve
from vitq_compiler.saturation import saturated

SATURATION = "R05"  # the rule of which the cost can be worked out
SAMPLES = 8  # on which it is
JUDGED = ("tensorrt",)  # targets that NVIDIA's compiler can judge
UNJUDGED_VERSION = "8.6"  # chooses types itself; TensorRT-RTX takes them from the graph


def check(
    model: ModelSource | Path | str,
    target: str = "onnxruntime",
    *,
    trt_version: str = "10",
    compute_capability: float | None = None,
    cpu: str = "any",
    with_judge: bool = False,
) -> LintReport:
    """Every place where a file breaks a rule of a target.

    Args:
        model: an ONNX file, made by whatever tool, or what else `find_model` takes; its weights are read only where a rule needs
            their numbers.
        target: name of a target.
        trt_version: of TensorRT: 8.6, 10 or 11; other targets have one version.
        compute_capability: of the GPU, such as 8.9; None leaves out what depends on it.
        cpu: which CPUs a graph for onnxruntime has to be right on: ``any``, or ``vnni`` (see `targets.onnxruntime`).
        with_judge: also ask NVIDIA's compiler, where it is installed and the target is TensorRT; it builds for 8.0 unless told otherwise.

    Raises:
        ModelError: the file cannot be read.
        RecipeError: there is no such target.
    """
    rules = load_target(target).rules
    platform = Platform(trt_version, compute_capability) if any(rule.versions for rule in rules) else Platform(cpu=cpu)
    source = find_model(model)
    proto = open_model(source.file)
    folder = follow_links(proto, source.file)
    verdict, hint = None, ""
    if with_judge and target in JUDGED and trt_version != UNJUDGED_VERSION:
        try:
            verdict = judge.judge(source.file, str(compute_capability or judge.DEFAULT_CAPABILITY))
            rules = (*rules, _accepted(verdict), _scaled_in_time(verdict))
        except TargetError as error:
            hint = str(error)
    findings = find(Model(proto, folder=folder), rules, platform)
    cost = _saturation_cost(source.file) if any(finding.rule.id == SATURATION for finding in findings) else None
    return LintReport(version("vitq-compiler"), source.name, target, platform, rules, findings, verdict, hint, cost)


def _saturation_cost(model: Path) -> float | None:
    """SQNR in dB of what a CPU without VNNI gives, on built-in samples, the least of all outputs; None where the graph does not run."""
    try:
        graph = Graph.from_proto(parse_model(model))
        graph.infer_shapes()
        data = open_data(None, graph.inputs, resolve(None, model), samples=SAMPLES, validation_samples=0)
        feed = next(data.calibration())
        exact, cut_off = (runtime.run(runtime.session(g, brief=True), feed) for g in (graph, saturated(graph)))
    except VitqError:
        return None
    return min((sqnr(a, b) for a, b in zip(exact, cut_off, strict=True) if a.dtype.kind == "f"), default=None)


def _scaled_in_time(verdict: judge.Verdict) -> Rule:
    """The rule that no sum of codes is written in half precision."""
    fault = Fault(None, f"{verdict.unscaled} products are written in half precision before they are scaled")
    return Rule(
        "J02",
        Severity.WARNING,
        "products are scaled before they are written",
        f"{verdict.compiler} multiplies by one number in a product, by one for each channel behind it: sums of codes beyond 65504 are lost",
        "give the codes of a weight one scale, and multiply by what the channels differ by behind the product",
        lambda model, platform: [fault] if verdict.unscaled else [],
    )


def _accepted(verdict: judge.Verdict) -> Rule:
    """The rule that the compiler itself takes the graph."""
    step = "built no engine" if verdict.parsed else "does not parse it"
    return Rule(
        "J01",
        Severity.ERROR,
        "NVIDIA's compiler takes the graph",
        f"{verdict.compiler} {step} for compute capability {verdict.capability}",
        "change what its message names",
        lambda model, platform: [Fault(None, error) for error in verdict.errors],
    )
