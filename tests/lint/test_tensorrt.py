"""Every rule of TensorRT on a graph that breaks it and on one that does not."""

import onnx
import pytest

from tests.lint.cases import CASES
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import Platform, check
from vitq_compiler.lint.tensorrt import RULES

DECIDED = [rule.id for rule in RULES if rule.check is not None]


def broken(model: onnx.ModelProto, platform: Platform) -> set[str]:
    """The rules that a model breaks."""
    return {finding.rule.id for finding in check(Model(model), RULES, platform)}


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == DECIDED
    assert len({rule.id for rule in RULES}) == len(RULES) == 52


def test_what_the_graph_cannot_tell_says_why() -> None:
    assert [rule.id for rule in RULES if rule.check is None] == ["T27", "S22", "S24"]


@pytest.mark.parametrize("rule", CASES)
def test_a_violation_is_found(rule: str) -> None:
    assert rule in broken(CASES[rule].broken, CASES[rule].platform)


@pytest.mark.parametrize("rule", CASES)
def test_a_graph_that_keeps_the_rule_passes(rule: str) -> None:
    assert rule not in broken(CASES[rule].kept, CASES[rule].platform)
