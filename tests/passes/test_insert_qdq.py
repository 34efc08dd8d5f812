"""insert-qdq: where Q and DQ go, and that the graph computes what fake_quantize says."""

import numpy as np
import pytest

from tests.builders import assert_golden, changes_of, compilation, graph_of, ops, run_model
from vitq_compiler.graph import Graph, value
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantParams, QuantSpec, fake_quantize, from_range, quantize

W = np.array([[1, -2, 0.5], [-3, 4, 0.25]], np.float32)
WEIGHT = QuantSpec(signed=True, symmetric=True, granularity="per_channel")


def quantized(graph: Graph, params: dict[Edge, QuantParams]) -> tuple[Compilation, int]:
    c = compilation(graph)
    c.params = params
    return c, changes_of(c, "insert-qdq")


def both(name: str, activation: QuantParams) -> dict[Edge, QuantParams]:
    return {Edge(name, 0): activation, Edge(name, 1): from_range(W.min(0), W.max(0), WEIGHT, 1)}


def range_of(low: float, high: float, bits: int = 8, **options: bool) -> QuantParams:
    return from_range(np.float32(low), np.float32(high), QuantSpec(bits, **options))


def test_golden() -> None:
    graph = graph_of("g (float[B, 2] x) => (float[B, 3] y) { y = MatMul(x, w) }", w=W)
    c, changes = quantized(graph, both(graph.nodes[0].name, range_of(-1, 1.55)))
    assert changes == 2
    assert_golden(c.graph, "insert_qdq")


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_the_graph_computes_fake_quantize(bits: int, signed: bool) -> None:
    graph = graph_of("g (float[B, 2] x) => (float[B, 3] y) { y = MatMul(x, w) }", w=W)
    params = both(graph.nodes[0].name, range_of(-1, 2, bits, signed=signed))
    c, _ = quantized(graph, params)
    x = np.random.default_rng(0).normal(0, 2, (50, 2)).astype(np.float32)
    expected = fake_quantize(x, params[Edge(graph.nodes[-1].name, 0)]) @ fake_quantize(W, params[Edge(graph.nodes[-1].name, 1)])
    np.testing.assert_allclose(run_model(c.graph, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
    assert ("Clip" in ops(c.graph)) is (bits < 8)


def test_weights_are_stored_as_codes() -> None:
    graph = graph_of("g (float[B, 2] x) => (float[B, 3] y) { y = MatMul(x, w) }", w=W)
    name = graph.nodes[0].name
    params = both(name, range_of(-1, 1))
    c, _ = quantized(graph, params)
    codes = c.graph.tensor(c.codes[Edge(name, 1)])
    assert value(codes).dtype == np.int8
    np.testing.assert_array_equal(value(codes), quantize(W, params[Edge(name, 1)]))
    assert not [t for t in c.graph.to_proto().graph.initializer if t.name == "w"], "the float weight is gone"


SHARED = "g (float[B, 2] x) => (float[B, 3] y) { a = Relu(x) m = MatMul(a, w) n = MatMul(a, w2) y = Add(m, n) }"


def test_equal_params_share_one_quantizer() -> None:
    graph = graph_of(SHARED, w=W, w2=W + 1)
    first, second = (node.name for node in graph.find("MatMul"))
    c, changes = quantized(graph, both(first, range_of(0, 2)) | both(second, range_of(0, 2)))
    assert changes == 4
    assert ops(c.graph).count("QuantizeLinear") == 1
    assert ops(c.graph).count("DequantizeLinear") == 3, "one for both activations, one for each weight"


def test_different_params_do_not() -> None:
    graph = graph_of(SHARED, w=W, w2=W + 1)
    first, second = (node.name for node in graph.find("MatMul"))
    params = both(first, range_of(0, 2)) | both(second, range_of(0, 3))
    c, _ = quantized(graph, params)
    assert ops(c.graph).count("QuantizeLinear") == 2
    x = np.random.default_rng(0).normal(0, 2, (20, 2)).astype(np.float32)
    a = np.maximum(x, 0)
    expected = sum(fake_quantize(a, params[Edge(n, 0)]) @ fake_quantize(w, params[Edge(n, 1)]) for n, w in ((first, W), (second, W + 1)))
    np.testing.assert_allclose(run_model(c.graph, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


def test_other_readers_see_the_float_tensor() -> None:
    graph = graph_of("g (float[B, 2] x) => (float[B, 3] y, float[B, 2] z) { a = Relu(x) y = MatMul(a, w) z = Neg(a) }", w=W)
    c, _ = quantized(graph, both(graph.find("MatMul")[0].name, range_of(0, 0.5)))
    x = np.array([[0.123, 7]], np.float32)
    np.testing.assert_array_equal(run_model(c.graph, {"x": x})[1], -x)


@pytest.mark.parametrize("bits", [4, 6])
def test_equal_scales_of_different_widths_do_not_share(bits: int) -> None:
    graph = graph_of(SHARED, w=W, w2=W)
    first, second = (node.name for node in graph.find("MatMul"))
    narrow = range_of(0, 2, bits)
    wide = QuantParams(narrow.scale, narrow.zero_point, None, 0, 255)
    params = both(first, narrow) | both(second, wide)
    c, _ = quantized(graph, params)
    x = np.array([[5, 6]], np.float32)
    expected = sum(fake_quantize(x, params[Edge(n, 0)]) @ fake_quantize(W, params[Edge(n, 1)]) for n in (first, second))
    np.testing.assert_allclose(run_model(c.graph, {"x": x})[0], expected, rtol=1e-5)


def test_weights_of_convolutions() -> None:
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    graph = graph_of("g (float[B, 3, 4, 4] x) => (float[B, 4, 3, 3] y) { y = Conv(x, w) }", w=kernel)
    name = graph.nodes[0].name
    weight = from_range(kernel.min((1, 2, 3)), kernel.max((1, 2, 3)), WEIGHT, 0)
    c, _ = quantized(graph, {Edge(name, 0): range_of(-2, 2), Edge(name, 1): weight})
    x = np.random.default_rng(1).normal(size=(1, 3, 4, 4)).astype(np.float32)
    plain = graph_of("g (float[B, 3, 4, 4] x) => (float[B, 4, 3, 3] y) { y = Conv(x, w) }", w=fake_quantize(kernel, weight))
    expected = run_model(plain, {"x": fake_quantize(x, range_of(-2, 2))})[0]
    np.testing.assert_allclose(run_model(c.graph, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
