"""If with a constant condition becomes its branch; all other control flow is refused with a reason."""

import numpy as np
import pytest

from tests.builders import model_of, run_model
from vitq_compiler.branches import inline_branches
from vitq_compiler.errors import ModelError

CHOICE = """g (float[2] x) => (float[2] y) {{ {before} r = If ({c}) <
    then_branch = a () => (float[2] o) {{ t = Relu(x) o = Add(t, {inner}) }},
    else_branch = b () => (float[2] o) {{ o = Neg(x) }}> y = Identity(r) }}"""
X = np.array([-1, 2], np.float32)


@pytest.mark.parametrize(
    ("before", "c", "taken"),
    [
        ("", "yes", True),
        ("", "no", False),
        ("c = Constant <value = bool[1] {1}> ()", "c", True),
        ("c = Not(yes)", "c", False),
        ("a1 = Cast <to = 9> (one) c = Identity(a1)", "c", True),
    ],
)
def test_the_branch_that_is_taken(before: str, c: str, taken: bool) -> None:
    model = model_of(CHOICE.format(before=before, c=c, inner="x"), yes=np.array(True), no=np.array(False), one=np.array(1, np.float32))
    expected = run_model(model, {"x": X})
    assert inline_branches(model.graph) == 1
    assert "If" not in {n.op_type for n in model.graph.node}
    np.testing.assert_array_equal(run_model(model, {"x": X})[0], expected[0])
    np.testing.assert_array_equal(expected[0], [-1, 4] if taken else [1, -2])


def test_branches_inside_branches_and_equal_names() -> None:
    text = """g (float[2] x) => (float[2] y) {
        r = If (yes) <then_branch = a () => (float[2] o) {
            t = Relu(x)
            o = If (no) <then_branch = d () => (float[2] p) { p = Neg(t) }, else_branch = e () => (float[2] p) { p = Exp(t) }> },
            else_branch = b () => (float[2] o) { o = Neg(x) }>
        y = If (yes) <then_branch = a () => (float[2] o) { t = Abs(r) o = Sqrt(t) }, else_branch = b () => (float[2] o) { o = Neg(x) }>
    }"""
    model = model_of(text, yes=np.array(True), no=np.array(False))
    expected = run_model(model, {"x": X})
    assert inline_branches(model.graph) == 3
    np.testing.assert_array_equal(run_model(model, {"x": X})[0], expected[0])
    np.testing.assert_allclose(expected[0], np.sqrt(np.exp([0, 2])), rtol=1e-6)


def test_a_computed_condition_is_refused() -> None:
    text = CHOICE.format(before="m = ReduceMax <keepdims = 0> (x) c = Greater(m, zero)", c="c", inner="x")
    model = model_of(text, zero=np.array(0, np.float32))
    model.graph.node[2].name = "branch"
    with pytest.raises(ModelError, match=r"control flow \(If node branch\) is not supported: its condition is computed; export with fixed"):
        inline_branches(model.graph)


def test_a_loop_is_refused() -> None:
    text = """g (float[2] x) => (float[2] y) {
        y = Loop (rounds, yes, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] w) { d = Identity(c) w = Add(v, v) }>
    }"""
    model = model_of(text, yes=np.array(True), rounds=np.array(3))
    with pytest.raises(ModelError, match=r"control flow \(Loop node .* is not supported: the number of rounds"):
        inline_branches(model.graph)
