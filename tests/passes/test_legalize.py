"""legalize: the target lowers, then its rules are checked."""

import pytest

from tests.builders import Sizes, changes_of, compilation, ops, run_passes, vit
from vitq_compiler.errors import TargetError
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import Fault, Platform, Rule, Severity
from vitq_compiler.pipeline import Compilation
from vitq_compiler.targets.onnxruntime import Onnxruntime

PREPARED = "canonicalize,recover-gelu,separate-linears,annotate,linearize-patch-embedding,calibrate,compute-qparams,insert-qdq"


def softmaxes(model: Model, platform: Platform) -> list[Fault]:
    return [Fault(node, "is there") for node in model.find("Softmax")]


def strict(severity: Severity) -> Onnxruntime:
    """A target with a rule against Softmax."""

    class Strict(Onnxruntime):
        rules = (*Onnxruntime.rules, Rule("X01", severity, "no Softmax", "it is not taken", "take it out", softmaxes))

    return Strict()


class Idle(Onnxruntime):
    """A target that lowers nothing."""

    def lower(self, c: Compilation) -> int:
        return 0


def test_lowers_every_quantized_linear() -> None:
    c = compilation(vit(Sizes(depth=1)))
    run_passes(c, PREPARED)
    quantized = [linear for linear in c.annotations.linears if linear.role != "head"]
    sums, moved = 3, 5  # Add before each LayerNormalization; Sum, LayerNormalization, Gelu, Sum, LayerNormalization on rows
    merged = 3  # of q, k and v: from rows to heads at once
    assert changes_of(c, "legalize") == len(quantized) + sums + moved + merged == 16
    assert ops(c.graph).count("Gemm") == len(quantized) == 5
    assert ops(c.graph).count("Sum") == sums


@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.SILENT])
def test_a_broken_rule_names_node_and_remedy(severity: Severity) -> None:
    c = compilation(vit(Sizes(depth=1)), target=strict(severity))
    run_passes(c, PREPARED)
    name = c.graph.find("Softmax")[0].name
    with pytest.raises(TargetError, match=rf"^target onnxruntime: X01: Softmax node {name}: is there; take it out$"):
        changes_of(c, "legalize")


def test_a_slow_graph_is_warned_of_once() -> None:
    c = compilation(vit(Sizes(depth=2)), target=strict(Severity.WARNING))
    run_passes(c, PREPARED)
    changes_of(c, "legalize")
    name = c.graph.find("Softmax")[0].name
    assert c.warnings == [f"X01: Softmax node {name}: is there; take it out (and 1 more)"]


def test_what_is_good_to_know_is_no_warning() -> None:
    c = compilation(vit(Sizes(depth=1)), target=strict(Severity.INFORMATION))
    run_passes(c, PREPARED)
    changes_of(c, "legalize")
    assert c.warnings == []


def test_the_target_decides() -> None:
    c = compilation(vit(Sizes(depth=1)), target=Idle())
    run_passes(c, PREPARED)
    assert changes_of(c, "legalize") == 0
    assert "Gemm" not in ops(c.graph)
