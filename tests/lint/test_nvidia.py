"""The linter's verdicts are those of NVIDIA's own parser and builder, where TensorRT-RTX is installed; no GPU is needed."""

import pytest

from tests.lint.cases import CASES
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import ERROR, check
from vitq_compiler.lint.tensorrt import RULES

pytest.importorskip("tensorrt_rtx_bindings")
from tests.lint.rtx import judge


@pytest.mark.parametrize("rule", CASES)
def test_what_nvidia_refuses_is_an_error(rule: str) -> None:
    case = CASES[rule]
    assert judge(case.broken, case.platform.compute_capability or 8.9) == case.verdict
    errors = [finding for finding in check(Model(case.broken), RULES, case.platform) if finding.severity is ERROR]
    assert errors or case.verdict == "ok"


@pytest.mark.parametrize("rule", CASES)
def test_what_has_no_errors_is_built(rule: str) -> None:
    case = CASES[rule]
    assert not [finding for finding in check(Model(case.kept), RULES, case.platform) if finding.severity is ERROR]
    assert judge(case.kept) == "ok"
