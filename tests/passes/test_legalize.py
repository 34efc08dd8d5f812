"""legalize: the target lowers, then its rules are checked."""

import pytest

from tests.builders import Sizes, changes_of, compilation, ops, run_passes, vit
from vitq_compiler.errors import TargetError
from vitq_compiler.pipeline import Compilation
from vitq_compiler.target import Rule
from vitq_compiler.targets.onnxruntime import Onnxruntime

PREPARED = "canonicalize,recover-gelu,separate-linears,annotate,linearize-patch-embedding,calibrate,compute-qparams,insert-qdq"


class Strict(Onnxruntime):
    """A target that takes no Softmax."""

    rules = (*Onnxruntime.rules, Rule("Softmax", lambda node: False, "is not taken"))


class Idle(Onnxruntime):
    """A target that lowers nothing."""

    def lower(self, c: Compilation) -> int:
        return 0


def test_lowers_every_quantized_linear() -> None:
    c = compilation(vit(Sizes(depth=1)))
    run_passes(c, PREPARED)
    quantized = [linear for linear in c.annotations.linears if linear.role != "head"]
    sums, moved = 3, 5  # Add before each LayerNormalization; Sum, LayerNormalization, Gelu, Sum, LayerNormalization on rows
    assert changes_of(c, "legalize") == len(quantized) + sums + moved == 13
    assert ops(c.graph).count("Gemm") == len(quantized) == 5
    assert ops(c.graph).count("Sum") == sums


def test_a_broken_rule_names_node_and_reason() -> None:
    c = compilation(vit(Sizes(depth=1)), target=Strict())
    run_passes(c, PREPARED)
    name = c.graph.find("Softmax")[0].name
    with pytest.raises(TargetError, match=rf"^target onnxruntime: Softmax node {name}: is not taken$"):
        changes_of(c, "legalize")


def test_the_target_decides() -> None:
    c = compilation(vit(Sizes(depth=1)), target=Idle())
    run_passes(c, PREPARED)
    assert changes_of(c, "legalize") == 0
    assert "Gemm" not in ops(c.graph)
