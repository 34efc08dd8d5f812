"""Limits on codes: the same codes for every value, and what is no limit of a quantizer stays."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import assert_golden, graph_of, ops, run_model
from vitq_compiler.graph import Graph
from vitq_compiler.qdq import quantize_activation
from vitq_compiler.quant import QuantSpec, fake_quantize, from_range, quantize
from vitq_compiler.targets._codes import clip_codes

TEXT = "c = Clip(x, low, high) {middle} q = QuantizeLinear({read}, s, z) y = DequantizeLinear(q, s, z)"


def quantized(middle: str = "", read: str = "c", **held: Any) -> Graph:
    """Clip, perhaps something, and a pair of quantizers of scale 0.5 and zero point 3."""
    given = {"low": np.float32(-1.5), "high": np.float32(6), "s": np.float32(0.5), "z": np.uint8(3)} | held
    return graph_of(f"g (float[N, 4] x) => (float[N, 4] y) {{ {TEXT.format(middle=middle, read=read)} }}", **given)


def test_golden() -> None:
    graph = quantized()
    assert clip_codes(graph) == 1
    assert_golden(graph.clean(), "clip_codes")


@given(
    st.integers(2, 7),
    st.tuples(st.floats(-50, 0), st.floats(0, 50)).filter(lambda ends: ends[1] - ends[0] > 1e-3),
    st.booleans(),
)
def test_codes_are_those_of_numpy(bits: int, ends: tuple[float, float], symmetric: bool) -> None:
    params = from_range(np.float32(ends[0]), np.float32(ends[1]), QuantSpec(bits=bits, symmetric=symmetric))
    graph = graph_of("g (float[N] x) => (float[N] y) { y = Identity(x) }")
    result = quantize_activation(graph, graph.find("Identity")[0].outputs[0], params)
    result.dtype = np.dtype(np.float32)
    graph.set_outputs([result])
    assert clip_codes(graph) == 1
    assert ops(graph.clean()) == ["Identity", "QuantizeLinear", "Clip", "DequantizeLinear"]
    steps = np.arange(-300, 300, dtype=np.float32)[:, None] + np.array([0, 0.3, -0.3], np.float32)  # away from ties
    x = (steps * params.scale).astype(np.float32).reshape(-1)
    x = np.concatenate([x, [-1e30, 1e30]]).astype(np.float32)
    (values,) = run_model(graph, {"x": x})
    np.testing.assert_allclose(values, fake_quantize(x, params), rtol=1e-6, atol=0)
    assert quantize(x, params).max() == params.quant_max


def test_a_reshape_may_lie_between() -> None:
    graph = quantized("r = Reshape(c, flat)", "r", flat=np.array([-1, 4]))
    x = np.random.default_rng(0).normal(0, 4, (6, 4)).astype(np.float32)
    before = run_model(graph, {"x": x})
    assert clip_codes(graph) == 1
    assert ops(graph.clean()) == ["Reshape", "QuantizeLinear", "Clip", "DequantizeLinear"]
    np.testing.assert_array_equal(before, run_model(graph, {"x": x}))


@pytest.mark.parametrize(
    "held",
    [{"high": np.float32(6.2)}, {"low": np.float32(-2)}, {"high": np.float32(200)}],
    ids=["between two codes", "below the first code", "above the last code"],
)
def test_a_clip_that_does_not_end_at_codes_stays(held: dict[str, np.ndarray]) -> None:
    graph = quantized(**held)
    assert clip_codes(graph) == 0
    assert ops(graph) == ["Clip", "QuantizeLinear", "DequantizeLinear"]


def test_a_clip_that_others_read_stays_for_them() -> None:
    graph = quantized("w = Relu(c)")
    graph.set_outputs([*graph.outputs, graph.find("Relu")[0].outputs[0]])
    graph.outputs[1].dtype = np.dtype(np.float32)
    x = np.random.default_rng(0).normal(0, 4, (6, 4)).astype(np.float32)
    before = run_model(graph, {"x": x})
    assert clip_codes(graph) == 1
    for a, b in zip(before, run_model(graph, {"x": x}), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ops(graph.clean()).count("Clip") == 2
