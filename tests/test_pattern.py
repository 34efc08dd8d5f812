"""Patterns: order of operands, repeated names, variants, factors."""

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.graph import Graph
from vitq_compiler.pattern import Operation, Pattern, const, either, factors, interior, match, nearest_miss, op, var


def expression(text: str, **weights: float | np.ndarray) -> Graph:
    """``y`` from inputs ``x`` and ``z``."""
    arrays = {name: np.asarray(w, np.float32) for name, w in weights.items()}
    return graph_of(f"g (float[4] x, float[4] z) => (float[4] y) {{ {text} }}", **arrays)


def matches(pattern: Pattern, graph: Graph) -> bool:
    return match(pattern, graph.tensor("y")) is not None


@pytest.mark.parametrize("kind", ["Add", "Mul"])
@pytest.mark.parametrize("order", ["a, x", "x, a"])
def test_commutative_operations_match_in_either_order(kind: str, order: str) -> None:
    graph = expression(f"a = Relu(z) y = {kind}({order})")
    bound = match(Operation(kind, (op.Relu(var("r")), var("v"))), graph.tensor("y"))
    assert bound is not None
    assert bound["r"] is graph.tensor("z")
    assert bound["v"] is graph.tensor("x")


def test_other_operations_do_not() -> None:
    pattern = op.Sub(op.Relu(var("r")), var("v"))
    assert matches(pattern, expression("a = Relu(z) y = Sub(a, x)"))
    assert not matches(pattern, expression("a = Relu(z) y = Sub(x, a)"))


def test_a_repeated_name_is_one_tensor() -> None:
    pattern = op.Mul(var("v"), op.Relu(var("v")))
    assert matches(pattern, expression("a = Relu(x) y = Mul(x, a)"))
    assert matches(pattern, expression("a = Relu(x) y = Mul(a, x)"))
    assert not matches(pattern, expression("a = Relu(x) y = Mul(z, a)"))


def test_the_second_order_is_tried_where_the_first_fails_deeper() -> None:
    # In the first order "v" is bound to the Relu; only the swap lets both uses of "v" agree.
    graph = expression("a = Relu(x) b = Add(a, x) y = Mul(b, x)")
    assert matches(op.Mul(op.Add(var("v"), op.Relu(var("v"))), var("v")), graph)


def test_backtracking_through_either() -> None:
    loose, strict = var("v"), op.Relu(var("v"))
    graph = expression("a = Relu(x) y = Sub(a, x)")
    bound = match(op.Sub(either(loose, strict), var("v")), graph.tensor("y"))
    assert bound is not None, "the first variant binds v to the Relu, which the second operand contradicts"
    assert bound["v"] is graph.tensor("x")


def test_either_prefers_the_first() -> None:
    graph = expression("y = Relu(x)")
    bound = match(either(op.Relu(var("first")), op.Relu(var("second"))), graph.tensor("y"))
    assert bound == {"first": graph.tensor("x")}


@pytest.mark.parametrize(("number", "found"), [(0.5, True), (0.50004, True), (0.501, False), (-0.5, False)])
def test_constants_by_value(number: float, found: bool) -> None:
    assert matches(op.Mul(var("v"), const(equals=0.5)), expression("y = Mul(x, c)", c=number)) is found


def test_a_vector_is_no_number() -> None:
    assert not matches(op.Mul(var("v"), const(equals=0.5)), expression("y = Mul(x, c)", c=np.full(4, 0.5)))
    assert matches(op.Mul(var("v"), const("c")), expression("y = Mul(x, c)", c=np.full(4, 0.5)))


def test_const_matches_no_activation() -> None:
    assert not matches(op.Mul(var("v"), const()), expression("y = Mul(x, z)"))


def test_named_binds_the_node() -> None:
    graph = expression("a = Relu(x) y = Neg(a)")
    bound = match(op.Neg(op.Relu(var("v")).named("relu")), graph.tensor("y"))
    assert bound is not None
    assert bound["relu"] is graph.find("Relu")[0]


def test_an_input_is_no_operation() -> None:
    assert not matches(op.Neg(op.Relu(var("v"))), expression("y = Neg(x)"))


def test_trailing_operands_are_free_and_missing_ones_fail() -> None:
    graph = expression("y = Clip(x, low)", low=0.0)
    assert matches(op.Clip(var("v")), graph)
    assert not matches(op.Clip(var("v"), const(), const()), graph)


@pytest.mark.parametrize(
    ("text", "number", "names"),
    [
        ("y = Relu(x)", 1, ["y"]),
        ("y = Mul(x, h)", 0.5, ["x"]),
        ("y = Mul(h, x)", 0.5, ["x"]),
        ("y = Div(x, h)", 2, ["x"]),
        ("a = Mul(x, h) y = Mul(a, z)", 0.5, ["x", "z"]),
        ("a = Div(x, h) b = Mul(z, h) y = Mul(a, b)", 1, ["x", "z"]),
        ("y = Div(x, z)", 1, ["y"]),
        ("y = Div(h, x)", 1, ["y"]),
        ("a = Add(x, z) y = Mul(a, h)", 0.5, ["a"]),
        ("y = Mul(x, x)", 1, ["x", "x"]),
    ],
)
def test_factors(text: str, number: float, names: list[str]) -> None:
    graph = expression(text, h=0.5)
    found, tensors = factors(graph.tensor("y"))
    assert found == pytest.approx(number)
    assert [t.name for t in tensors] == names


def test_factors_with_zero() -> None:
    assert factors(expression("y = Mul(x, c)", c=0.0).tensor("y"))[0] == 0
    graph = expression("y = Div(x, c)", c=0.0)
    assert factors(graph.tensor("y")) == (1.0, [graph.tensor("y")]), "a division by zero is no factor"


def test_interior() -> None:
    graph = expression("a = Relu(x) b = Neg(a) y = Add(b, a)")
    relu, neg, add = graph.nodes
    assert interior([neg], graph.tensor("b"))
    assert interior([relu, neg, add], graph.tensor("y"))
    assert not interior([relu, neg], graph.tensor("b")), "the Add reads a"


def test_the_nearest_miss_is_the_farthest_up() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { a = Exp(x) b = Sqrt(a) y = Neg(b) }")
    pattern = either(op.Neg(op.Relu(var("x"))), op.Neg(op.Sqrt(op.Abs(var("x")))))
    miss = nearest_miss(pattern, graph.tensor("y"))
    assert miss is not None
    assert (miss.reason, miss.where) == ("Exp Exp_0 stands where Abs is looked for", "Exp_0")
    assert nearest_miss(pattern, graph.tensor("y"), depth=3) is None
    assert nearest_miss(op.Neg(op.Sqrt(var("x"))), graph.tensor("y")) is None
