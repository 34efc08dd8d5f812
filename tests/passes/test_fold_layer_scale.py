"""fold-layer-scale: into weight and bias, and where that would change something else."""

import numpy as np
import pytest

from tests.builders import assert_golden, changes_of, compilation, difference, feed_of, graph_of, ops, run_model
from vitq_compiler.blocks.linear import find_linears
from vitq_compiler.graph import Graph, value
from vitq_compiler.pipeline import Compilation

W = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.array([1, -1, 2], np.float32)
GAMMA = np.array([0.5, 0, -2], np.float32)


def scaled(text: str, **weights: np.ndarray) -> Graph:
    held = {"w": W, "c": BIAS, "gamma": GAMMA} | weights
    return graph_of(f"g (float[B, 5, 2] x) => (float[B, 5, 3] y) {{ {text} }}", **held)


def folded(graph: Graph) -> tuple[Compilation, int]:
    """The compilation after the pass and its changes; outputs are kept to 1e-5 and a second run does nothing."""
    c = compilation(graph)
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "fold-layer-scale")
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert changes_of(c, "fold-layer-scale") == 0
    return c, changes


@pytest.mark.parametrize("gamma", [GAMMA, GAMMA[None], GAMMA[None, None]], ids=lambda g: str(g.shape))
@pytest.mark.parametrize("order", ["b, gamma", "gamma, b"])
def test_folds(order: str, gamma: np.ndarray) -> None:
    c, changes = folded(scaled(f"a = MatMul(x, w) b = Add(a, c) d = Mul({order}) y = Relu(d)", gamma=gamma))
    assert (changes, ops(c.graph)) == (1, ["MatMul", "Add", "Relu"])
    (linear,) = find_linears(c.graph)
    assert linear.bias is not None
    np.testing.assert_array_equal(value(linear.weight), W * GAMMA)
    np.testing.assert_array_equal(value(linear.bias), BIAS * GAMMA)


def test_golden() -> None:
    c, _ = folded(scaled("a = MatMul(x, w) b = Add(a, c) d = Mul(gamma, b) y = Relu(d)"))
    assert_golden(c.graph, "fold_layer_scale")


def test_without_a_bias() -> None:
    c, changes = folded(scaled("a = MatMul(x, w) b = Mul(a, gamma) y = Add(b, c)"))
    assert (changes, ops(c.graph)) == (1, ["MatMul", "Add"])
    (linear,) = find_linears(c.graph)
    assert linear.bias is not None, "what was an Add after the scale is now the bias"
    np.testing.assert_array_equal(value(linear.bias), BIAS)


def test_the_scaled_result_is_a_graph_output() -> None:
    c, changes = folded(scaled("a = MatMul(x, w) b = Add(a, c) y = Mul(b, gamma)"))
    assert (changes, ops(c.graph), c.graph.output_names) == (1, ["MatMul", "Add"], ["y"])


def test_two_scales_in_a_row() -> None:
    c, changes = folded(scaled("a = MatMul(x, w) b = Mul(a, gamma) d = Mul(b, g2) y = Relu(d)", g2=np.array([2, 3, 4], np.float32)))
    assert (changes, ops(c.graph)) == (2, ["MatMul", "Relu"])


@pytest.mark.parametrize(
    "graph",
    [
        scaled("a = MatMul(x, w) b = Mul(a, gamma) d = Relu(a) y = Add(b, d)"),
        scaled("a = MatMul(x, w) b = Mul(a, gamma) y = Add(b, a)"),
        scaled("a = MatMul(x, w) y = Mul(a, a)"),
        scaled("a = MatMul(x, w) b = Relu(a) y = Mul(a, b)"),
        scaled("a = MatMul(x, w) y = Mul(a, two)", two=np.array(2, np.float32)),
        scaled("a = MatMul(x, w) y = Mul(a, column)", column=np.arange(5, dtype=np.float32)[:, None]),
        scaled("a = MatMul(x, w) y = Mul(a, full)", full=np.arange(15, dtype=np.float32).reshape(5, 3)),
        scaled("a = MatMul(x, w) y = Div(a, gamma)", gamma=np.ones(3, np.float32)),
    ],
    ids=["also read", "also read by the sum", "square", "gate", "number", "per token", "per token and channel", "quotient"],
)
def test_what_is_no_layer_scale_stays(graph: Graph) -> None:
    before = ops(graph)
    c, changes = folded(graph)
    assert (changes, ops(c.graph)) == (0, before)


def test_an_output_that_is_also_a_graph_output_stays() -> None:
    graph = graph_of("g (float[B, 2] x) => (float[B, 3] a, float[B, 3] y) { a = MatMul(x, w) y = Mul(a, gamma) }", w=W, gamma=GAMMA)
    assert folded(graph)[1] == 0


def test_a_scale_with_more_axes_than_its_operand_stays() -> None:
    graph = graph_of("g (float[B, 2] x) => (float[1, B, 3] y) { a = MatMul(x, w) y = Mul(a, gamma) }", w=W, gamma=GAMMA[None, None])
    assert folded(graph)[1] == 0
