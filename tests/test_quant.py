"""Quantization arithmetic against two oracles (the ONNX reference and ONNX Runtime), and its properties."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import helper
from onnx.reference import ReferenceEvaluator

from tests.builders import graph_of, run_model
from vitq_compiler.quant import E4M3, QuantParams, QuantSpec, anchor, dequantize, fake_quantize, from_range, quantize
from vitq_compiler.tensors import from_array, onnx_type

SPECS = [
    QuantSpec(),
    QuantSpec(signed=True),
    QuantSpec(signed=True, symmetric=True),
    QuantSpec(symmetric=True),
]
specs = st.builds(QuantSpec, st.integers(2, 8), st.booleans(), st.booleans())
floats = st.floats(-1e3, 1e3, width=32)
ranges = st.tuples(floats, floats).map(lambda pair: (min(pair), max(pair)))


def onnx_codes(x: np.ndarray, params: QuantParams) -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear with ``params``: x -> codes, values."""
    axis: dict[str, Any] = {} if params.axis is None else {"axis": params.axis}
    kind = onnx_type(params.dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], **axis),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["values"], **axis),
    ]
    info = helper.make_tensor_value_info
    outputs = [info("codes", kind, list(x.shape)), info("values", onnx.TensorProto.FLOAT, list(x.shape))]
    weights = [
        from_array(params.scale, "scale"),
        from_array(params.zero_point.astype(params.dtype), "zero_point"),
    ]
    graph = helper.make_graph(nodes, "g", [info("x", onnx.TensorProto.FLOAT, list(x.shape))], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def assert_matches_oracles(x: np.ndarray, params: QuantParams) -> None:
    model = onnx_codes(x, params)
    for codes, values in (run_model(model, {"x": x}), ReferenceEvaluator(model).run(None, {"x": x})):
        np.testing.assert_array_equal(quantize(x, params), codes)
        np.testing.assert_array_equal(fake_quantize(x, params), values)
        assert quantize(x, params).dtype == codes.dtype


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matches_onnx_per_tensor(spec: QuantSpec) -> None:
    x = np.random.default_rng(0).normal(0.3, 2, (7, 11)).astype(np.float32)
    assert_matches_oracles(x, from_range(np.float32(-3), np.float32(4.7), spec))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matches_onnx_per_channel(spec: QuantSpec, axis: int) -> None:
    x = np.random.default_rng(1).normal(0, 1, (3, 4, 5)).astype(np.float32) * np.array([0.01, 1, 3, 50, 900], np.float32)
    others = tuple(i for i in range(3) if i != axis)
    params = from_range(x.min(others), x.max(others), spec, axis)
    assert params.scale.shape == (x.shape[axis],)
    assert_matches_oracles(x, params)


def test_rounds_half_to_even() -> None:
    params = QuantParams(np.float32(0.5).reshape(()), np.int32(0).reshape(()), None, -128, 127)
    x = np.array([0.25, 0.75, 1.25, 1.75, -0.25, -0.75, -1.25], np.float32)  # codes 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5
    np.testing.assert_array_equal(quantize(x, params), [0, 2, 2, 4, 0, -2, -2])
    assert_matches_oracles(x, params)


def test_the_zero_point_is_added_after_rounding() -> None:
    params = QuantParams(np.float32(1).reshape(()), np.int32(3).reshape(()), None, 0, 255)
    x = np.array([0.5, 1.5, 2.5], np.float32)  # rounding x / scale + 3 would give 4, 4, 6
    np.testing.assert_array_equal(quantize(x, params), [3, 5, 5])
    assert_matches_oracles(x, params)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_saturates(spec: QuantSpec) -> None:
    params = from_range(np.float32(-1), np.float32(1), spec)
    x = np.array([-1e30, -5, 5, 1e30], np.float32)
    np.testing.assert_array_equal(quantize(x, params), [spec.quant_min, spec.quant_min, spec.quant_max, spec.quant_max])


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges(bits: int) -> None:
    count = 2**bits
    assert (QuantSpec(bits).quant_min, QuantSpec(bits).quant_max) == (0, count - 1)
    assert (QuantSpec(bits, signed=True).quant_min, QuantSpec(bits, signed=True).quant_max) == (-count // 2, count // 2 - 1)
    both = QuantSpec(bits, signed=True, symmetric=True)
    assert (both.quant_min, both.quant_max) == (1 - count // 2, count // 2 - 1)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        QuantSpec(bits)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_constant_zero_range_quantizes_to_zero(spec: QuantSpec) -> None:
    low, high = np.array([0, -1], np.float32), np.array([0, 1], np.float32)
    params = from_range(low, high, spec, axis=0)
    assert params.scale[0] > np.finfo(np.float32).tiny, "a subnormal scale may be flushed to zero"
    x = np.array([[0, 0], [0.5, -1]], np.float32)
    assert np.isfinite(fake_quantize(x, params)).all()
    np.testing.assert_array_equal(fake_quantize(x, params)[0], 0)
    assert_matches_oracles(x, params)


@pytest.mark.parametrize(
    ("scale", "zero_point", "axis", "message"),
    [
        (np.ones(3), np.zeros(3), None, "do not fit"),
        (np.ones(()), np.zeros(()), 0, "do not fit"),
        (np.ones(3), np.zeros(2), 0, "do not fit"),
        (np.zeros(()), np.zeros(()), None, "positive"),
        (-np.ones(()), np.zeros(()), None, "positive"),
        (np.full((), np.inf), np.zeros(()), None, "positive"),
        (np.full((), np.nan), np.zeros(()), None, "positive"),
        (np.ones(()), np.full((), 256), None, "outside"),
        (np.ones(()), np.full((), -1), None, "outside"),
    ],
)
def test_refuses_params_that_contradict_themselves(scale: np.ndarray, zero_point: np.ndarray, axis: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantParams(scale.astype(np.float32), zero_point.astype(np.int32), axis, 0, 255)


@given(specs, ranges, arrays(np.float32, array_shapes(max_dims=2), elements=floats))
def test_error_is_at_most_half_a_step_inside_the_range(spec: QuantSpec, limits: tuple[float, float], x: np.ndarray) -> None:
    low, high = limits
    params = from_range(np.float32(low), np.float32(high), spec)
    first, last = (float(dequantize(np.array([code]), params)[0]) for code in (spec.quant_min, spec.quant_max))
    x = np.clip(x, np.float32(first), np.float32(last))
    slack = 1e-5 * max(abs(first), abs(last))
    assert (np.abs(x - fake_quantize(x, params)) <= float(params.scale) / 2 + slack).all()


@given(st.integers(2, 7), ranges, arrays(np.float32, array_shapes(max_dims=2), elements=floats))
def test_anchored_codes_stand_for_the_values_of_asymmetric_ones(bits: int, limits: tuple[float, float], x: np.ndarray) -> None:
    """With zero for a zero point, in int8."""
    plain = from_range(np.float32(limits[0]), np.float32(limits[1]), QuantSpec(bits))
    anchored = anchor(plain)
    np.testing.assert_array_equal(fake_quantize(x, plain), fake_quantize(x, anchored))
    assert (int(anchored.zero_point), anchored.dtype, anchored.quant_max - anchored.quant_min) == (0, np.int8, 2**bits - 1)
    assert quantize(x, anchored).dtype == np.int8


@pytest.mark.parametrize("options", [{"bits": 8}, {"symmetric": True}, {"granularity": "per_channel"}])
def test_what_cannot_be_anchored(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="anchored codes are asymmetric, of one scale, and of at most 7 bits"):
        QuantSpec(**{"bits": 4, "anchored": True} | options)


@given(specs, ranges)
def test_the_range_is_covered(spec: QuantSpec, limits: tuple[float, float]) -> None:
    params = from_range(np.float32(limits[0]), np.float32(limits[1]), spec)
    x = np.array(limits, np.float32)
    assert (np.abs(x - fake_quantize(x, params)) <= float(params.scale) * 0.5001).all()


@given(specs, ranges, arrays(np.float32, st.integers(2, 20), elements=floats))
def test_monotone(spec: QuantSpec, limits: tuple[float, float], x: np.ndarray) -> None:
    params = from_range(np.float32(limits[0]), np.float32(limits[1]), spec)
    assert (np.diff(fake_quantize(np.sort(x), params)) >= 0).all()


@given(specs, ranges)
def test_zero_is_exact(spec: QuantSpec, limits: tuple[float, float]) -> None:
    params = from_range(np.float32(limits[0]), np.float32(limits[1]), spec)
    assert fake_quantize(np.zeros(1, np.float32), params)[0] == 0
    if spec.symmetric:
        assert params.zero_point == (0 if spec.signed else 2 ** (spec.bits - 1))


@given(specs, ranges, arrays(np.float32, st.tuples(st.integers(1, 4), st.just(3)), elements=floats))
def test_equal_channels_are_per_tensor(spec: QuantSpec, limits: tuple[float, float], x: np.ndarray) -> None:
    low, high = np.float32(limits[0]), np.float32(limits[1])
    tensor, channel = from_range(low, high, spec), from_range(np.full(3, low), np.full(3, high), spec, axis=1)
    np.testing.assert_array_equal(quantize(x, tensor), quantize(x, channel))
    np.testing.assert_array_equal(fake_quantize(x, tensor), fake_quantize(x, channel))


@given(specs, ranges, arrays(np.float32, 5, elements=floats))
def test_fake_quantize_is_a_projection(spec: QuantSpec, limits: tuple[float, float], x: np.ndarray) -> None:
    params = from_range(np.float32(limits[0]), np.float32(limits[1]), spec)
    once = fake_quantize(x, params)
    np.testing.assert_array_equal(fake_quantize(once, params), once)


@given(specs, ranges)
def test_every_code_survives(spec: QuantSpec, limits: tuple[float, float]) -> None:
    params = from_range(np.float32(limits[0]), np.float32(limits[1]), spec)
    codes = np.arange(spec.quant_min, spec.quant_max + 1)
    np.testing.assert_array_equal(quantize(dequantize(codes, params), params), codes)


def test_a_negative_axis_counts_from_the_end() -> None:
    x = np.random.default_rng(2).normal(size=(2, 3)).astype(np.float32)
    params = [from_range(x.min(0), x.max(0), QuantSpec(), axis) for axis in (1, -1)]
    np.testing.assert_array_equal(quantize(x, params[0]), quantize(x, params[1]))


def test_8_bit_floats_are_those_of_onnxruntime() -> None:
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) * np.float32([1e-4, 1e-2, 0.1, 1, 3, 10, 100, 1000])
    params = from_range(np.float32(-900), np.float32(800), QuantSpec(format="e4m3"))
    assert params.scale == np.float32(900 / 448)
    assert params.dtype == E4M3
    text = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
    graph = graph_of(f"g (float[64, 8] x) => (float[64, 8] y) {{ {text} }}", s=params.scale, z=np.zeros((), E4M3))
    np.testing.assert_array_equal(run_model(graph, {"x": x})[0], fake_quantize(x, params))
    step = np.maximum(np.abs(x) / 16, params.scale * 2.0**-10)  # half of the last bit of three, or of the smallest number
    assert (np.abs(fake_quantize(x, params) - np.clip(x, -900, 900)) <= step * 1.0001).all()


def test_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="format must be int or e4m3, got 'e5m2'"):
        QuantSpec(format="e5m2")  # type: ignore[arg-type]
