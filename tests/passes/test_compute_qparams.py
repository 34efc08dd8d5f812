"""compute-qparams: which range makes which scale."""

import numpy as np
import pytest

from tests.builders import compilation, graph_of
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics
from vitq_compiler.passes.compute_qparams import ComputeQparams, weight_params
from vitq_compiler.quant import Edge, QuantSpec, fake_quantize

PER_CHANNEL = QuantSpec(signed=True, symmetric=True, granularity="per_channel")
PER_TENSOR = QuantSpec(signed=True, symmetric=True)
W = np.array([[1, -20, 0.5], [-3, 4, 0.25]], np.float32)


def test_an_activation_takes_the_range_of_all_channels() -> None:
    c = compilation(graph_of("g (float[B, 2] x) => (float[B, 3] y) { y = MatMul(x, w) }", w=W))
    name = c.graph.nodes[0].name
    c.specs = {Edge(name, 0): QuantSpec(), Edge(name, 1): PER_CHANNEL}
    low, high = np.array([-1, 0], np.float32), np.array([0.5, 4.1], np.float32)
    c.table = CalibrationTable({"x": ChannelStatistics(low, high, low)}, 1)
    assert ComputeQparams().run(c) == 2
    params = c.params[Edge(name, 0)]
    assert params.axis is None
    assert float(params.scale) == pytest.approx(5.1 / 255)
    assert int(params.zero_point) == 50
    np.testing.assert_allclose(c.params[Edge(name, 1)].scale, np.array([3, 20, 0.5]) / 127, rtol=1e-6)


def test_weights_of_a_linear_have_their_channels_last() -> None:
    node = graph_of("g (float[B, 2] x) => (float[B, 3] y) { y = MatMul(x, w) }", w=W).nodes[0]
    params = weight_params(node, PER_CHANNEL)
    assert params.axis == 1
    np.testing.assert_allclose(params.scale, np.array([3, 20, 0.5]) / 127, rtol=1e-6)
    assert (params.zero_point == 0).all()
    assert (np.abs(W - fake_quantize(W, params)) <= params.scale / 2 * 1.0001).all()
    whole = weight_params(node, PER_TENSOR)
    assert whole.axis is None
    assert float(whole.scale) == pytest.approx(20 / 127)


def test_weights_of_a_convolution_have_their_channels_first() -> None:
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32) * np.array([1, 10, 100, 0]).reshape(4, 1, 1, 1)
    node = graph_of("g (float[B, 3, 4, 4] x) => (float y) { y = Conv(x, w) }", w=kernel.astype(np.float32)).nodes[0]
    params = weight_params(node, PER_CHANNEL)
    assert params.axis == 0
    np.testing.assert_allclose(params.scale[:3], np.abs(kernel).max((1, 2, 3))[:3] / 127, rtol=1e-6)
    assert params.scale[3] > 0, "a channel of zeros"
