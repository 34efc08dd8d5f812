"""Linear layers: what is one, its bias."""

import numpy as np
import pytest

from tests.builders import graph_of, ops, run_model
from vitq_compiler.blocks.linear import Linear, add_to_bias, find_linears
from vitq_compiler.graph import Graph, value

W, BIAS = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([1, 2, 3, 4], np.float32)


def graph(text: str, **weights: np.ndarray) -> Graph:
    held = {"w": W, "c": BIAS} | weights
    return graph_of(f"g (float[B, 5, 3] x) => (float[B, 5, 4] y) {{ {text} }}", **held)


def only(g: Graph) -> Linear:
    (linear,) = find_linears(g)
    return linear


def test_with_a_bias() -> None:
    g = graph("m = MatMul(x, w) y = Add(m, c)")
    linear = only(g)
    assert linear.input is g.tensor("x")
    assert linear.weight is g.tensor("w")
    assert linear.bias is g.tensor("c")
    assert linear.output is g.tensor("y")
    assert (linear.in_features, linear.out_features) == (3, 4)
    assert (linear.name, linear.role, linear.block) == (g.find("MatMul")[0].name, "linear", "")


@pytest.mark.parametrize(
    "text",
    [
        "y = MatMul(x, w)",
        "m = MatMul(x, w) y = Relu(m)",
        "m = MatMul(x, w) y = Add(m, m)",
        "m = MatMul(x, w) n = Relu(m) y = Add(m, n)",
        "m = MatMul(x, w) y = Add(m, number)",
        "m = MatMul(x, w) y = Add(m, row)",
        "m = MatMul(x, w) y = Add(m, per_token)",
        "m = MatMul(x, w) a = Add(m, c) b = Relu(m) y = Add(a, b)",
    ],
)
def test_without_a_bias(text: str) -> None:
    numbers = {"number": np.array(1, np.float32), "row": BIAS[None], "per_token": np.ones((5, 4), np.float32)}
    g = graph(text, **numbers)
    linear = only(g)
    assert linear.bias is None
    assert linear.output is linear.matmul.outputs[0]


def test_a_product_that_is_a_graph_output_has_no_bias() -> None:
    g = graph("m = MatMul(x, w) y = Add(m, c)")
    g.set_outputs([g.tensor("y"), g.tensor("m")])
    assert only(g).bias is None


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("t = Transpose <perm = [0, 2, 1]> (x) m = MatMul(x, t) y = MatMul(m, big)", {"big": np.ones((1, 5, 4), np.float32)}),
        ("y = MatMul(left, x)", {"left": np.ones((5, 5), np.float32)}),
        ("y = MatMul(x, vector)", {"vector": np.ones(3, np.float32)}),
    ],
)
def test_other_products_are_none(text: str, weights: dict[str, np.ndarray]) -> None:
    g = graph_of(f"g (float[B, 5, 3] x) => (float y) {{ {text} }}", **weights)
    assert find_linears(g) == []


@pytest.mark.parametrize("text", ["m = MatMul(x, w) y = Add(m, c)", "m = MatMul(x, w) y = Relu(m)", "y = MatMul(x, w)"])
def test_adding_to_the_bias(text: str) -> None:
    g = graph(text)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    linear = only(g)
    had = linear.bias is not None
    before = value(linear.bias) if linear.bias is not None else np.zeros(4)
    add_to_bias(g, linear, np.array([10, 20, 30, 40]))
    assert linear.bias is not None
    np.testing.assert_array_equal(value(linear.bias), before + np.array([10, 20, 30, 40]))
    y = run_model(g, {"x": x})[0]
    expected = x @ W + before + np.array([10, 20, 30, 40])
    np.testing.assert_allclose(y, np.maximum(expected, 0) if "Relu" in text else expected, rtol=1e-5)
    assert ops(g).count("Add") == 1
    assert only(g).bias is linear.bias, "found again, bias and all"
    assert had or linear.add is not None
