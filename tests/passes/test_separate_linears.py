"""separate-linears: every Gemm that is a Linear, and those that are not."""

import numpy as np
import pytest

from tests.builders import assert_golden, changes_of, compilation, difference, feed_of, graph_of, ops, run_model
from vitq_compiler.blocks.linear import find_linears
from vitq_compiler.graph import Graph, value
from vitq_compiler.pipeline import Compilation

W = np.arange(12, dtype=np.float32).reshape(3, 4)
BIAS = np.array([1, -1, 2, 0.5], np.float32)


def separated(graph: Graph) -> tuple[Compilation, int]:
    """The compilation after the pass and its changes; outputs are kept to 1e-5 and a second run does nothing."""
    c = compilation(graph)
    feed = feed_of(c.graph, batch=4)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "separate-linears")
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert changes_of(c, "separate-linears") == 0
    return c, changes


def gemm(attributes: str = "", inputs: str = "x, w, c", **weights: np.ndarray) -> Graph:
    names = [name.strip() for name in inputs.split(",")]
    held = {name: array for name, array in ({"w": W, "c": BIAS} | weights).items() if name in names}
    return graph_of(f"g (float[B, 3] x) => (float[B, 4] y) {{ y = Gemm {attributes} ({inputs}) }}", **held)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, -2.0), (0.25, 3.0)])
@pytest.mark.parametrize(
    "bias", [BIAS, BIAS[None], np.array(2, np.float32), np.array([2], np.float32), np.array([[2]], np.float32)], ids=str
)
def test_every_gemm_of_a_linear(transposed: int, alpha: float, beta: float, bias: np.ndarray) -> None:
    attributes = f"<alpha = {alpha}, beta = {beta}, transB = {transposed}>"
    c, changes = separated(gemm(attributes, w=W.T.copy() if transposed else W, c=bias))
    assert changes == 1
    assert ops(c.graph) == ["MatMul", "Add"]
    (linear,) = find_linears(c.graph)
    assert linear.bias is not None
    np.testing.assert_allclose(value(linear.weight), alpha * W)
    np.testing.assert_allclose(value(linear.bias), beta * np.broadcast_to(bias.reshape(-1), 4))


def test_golden() -> None:
    c, _ = separated(gemm("<alpha = 0.5, transB = 1>", w=W.T.copy()))
    assert_golden(c.graph, "separate_linears")


@pytest.mark.parametrize("inputs", ["x, w", "x, w, "])
def test_no_bias(inputs: str) -> None:
    c, changes = separated(gemm(inputs=inputs))
    assert (changes, ops(c.graph)) == (1, ["MatMul"])


@pytest.mark.parametrize(
    "graph",
    [
        graph_of("g (float[3, 4] x) => (float[4, 4] y) { y = Gemm <transA = 1> (x, w) }", w=W),
        graph_of("g (float[B, 3] x, float[3, 4] z) => (float[B, 4] y) { y = Gemm(x, z, c) }", c=BIAS),
        graph_of("g (float[B, 3] x, float[4] z) => (float[B, 4] y) { y = Gemm(x, w, z) }", w=W),
        graph_of("g (float[4, 3] x) => (float[4, 4] y) { y = Gemm(x, w, c) }", w=W, c=np.arange(16, dtype=np.float32).reshape(4, 4)),
        graph_of("g (float[4, 3] x) => (float[4, 4] y) { y = Gemm(x, w, c) }", w=W, c=np.arange(4, dtype=np.float32).reshape(4, 1)),
    ],
    ids=["transposed activation", "computed weight", "computed bias", "bias per row and column", "bias per row"],
)
def test_other_products_are_left_alone(graph: Graph) -> None:
    c, changes = separated(graph)
    assert (changes, ops(c.graph)) == (0, ["Gemm"])


def test_the_bias_goes_to_the_right() -> None:
    c, changes = separated(graph_of("g (float[B, 5, 3] x) => (float[B, 5, 4] y) { a = MatMul(x, w) y = Add(c, a) }", w=W, c=BIAS))
    assert changes == 1
    (linear,) = find_linears(c.graph)
    assert linear.bias is c.graph.tensor("c")


def test_other_sums_are_left_alone() -> None:
    c, changes = separated(
        graph_of("g (float[B, 3] x, float[B, 4] z) => (float[B, 4] y) { a = MatMul(x, w) b = Add(z, a) y = Add(c, b) }", w=W, c=BIAS)
    )
    assert changes == 0
    (linear,) = find_linears(c.graph)
    assert linear.bias is None
