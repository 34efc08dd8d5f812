"""What every quantizer keeps, found by the registry: a new file is tested the day it lands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import graph_of, run_model
from vitq_compiler.qdq import quantize_activation
from vitq_compiler.quant import QuantParams, QuantSpec, fake_quantize, quantize
from vitq_compiler.quantizer import Quantizer, quantizer_for
from vitq_compiler.registry import load, names

NAMES = names("quantizers")
BITS = (3, 4, 6, 8)
OPTIONS = {
    "affine": [{}, {"symmetric": True}, {"signed": True}],
    "log": [{"base": 2.0}, {"base": 2.0**0.5}, {}, {"base": 2.0**0.5, "zero": True}],
    "shifted-log": [{}, {"shift": 0.17}],
}
CASES = [(name, bits, options) for name in NAMES for bits in BITS for options in OPTIONS.get(name, [{}])]
CASES += [(name, bits, options | {"anchored": True}) for name, bits, options in CASES if bits == 4 and not options.get("symmetric")]
NAMED = pytest.mark.parametrize(("name", "bits", "options"), CASES, ids=str)
GELU = (-0.17, 5.0)
PROBABILITIES = (0.0, 1.0)


def ranges(name: str) -> list[tuple[float, float]]:
    """What the quantizer is for."""
    return [PROBABILITIES] if name in ("log", "tan") else [PROBABILITIES, GELU]


def spec_of(name: str, bits: int, options: dict[str, object]) -> QuantSpec:
    return QuantSpec(bits=bits, quantizer=name, **options)  # type: ignore[arg-type]


def samples(low: float, high: float, seed: int = 0) -> np.ndarray:
    """Most values small, as after softmax or GELU, beyond the range at both ends too where it is not one of probabilities."""
    x = low + (high - low) * np.random.default_rng(seed).random(4000) ** 4
    return np.concatenate([x, [low, high, 0.0] if low == 0 else [low, high, 0.0, 3 * low, 3 * high]]).astype(np.float32)


def agree_but_for_ties(codes: np.ndarray, x: np.ndarray, params: QuantParams) -> None:
    """Equal codes; a value that lies half way between two to 1e-4 of a step may take either."""
    expected = quantize(x, params)
    t = x if params.curve is None else params.curve.forward(x)
    halfway = np.abs(np.abs(t / params.scale - np.trunc(t / params.scale)) - 0.5) < 1e-4
    wrong = codes != expected
    assert not (wrong & ~halfway).any(), (x[wrong], codes[wrong], expected[wrong])
    assert np.abs(codes.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_its_name_is_its_file(name: str) -> None:
    assert issubclass(load("quantizers", name), Quantizer)
    assert load("quantizers", name).name == name


@NAMED
def test_no_more_than_its_codes(name: str, bits: int, options: dict[str, object]) -> None:
    spec = spec_of(name, bits, options)
    for low, high in ranges(name):
        x = np.linspace(low - 1, high + 1, 20001, dtype=np.float32)
        params = quantizer_for(spec).from_range(low, high, spec)
        values = np.unique(fake_quantize(x, params))
        assert params.quant_max - params.quant_min < 2**bits
        assert len(values) <= 2**bits
        if bits <= 4:  # with many bits a given base reaches values that do not occur
            assert len(values) > 2 ** (bits - 1), "half of the codes must be of use in the range they are made for"


@NAMED
def test_a_value_of_a_code_keeps_it_and_order_is_kept(name: str, bits: int, options: dict[str, object]) -> None:
    spec = spec_of(name, bits, options)
    for low, high in ranges(name):
        params = quantizer_for(spec).from_range(low, high, spec)
        x = np.sort(samples(low, high))
        once = fake_quantize(x, params)
        np.testing.assert_allclose(fake_quantize(once, params), once, rtol=1e-5, atol=1e-6)
        assert (np.diff(once) >= 0).all()


@NAMED
def test_the_starting_point_covers_the_range(name: str, bits: int, options: dict[str, object]) -> None:
    spec = spec_of(name, bits, options)
    for low, high in ranges(name):
        ends = np.array([low, high], np.float32)
        error = np.abs(fake_quantize(ends, quantizer_for(spec).from_range(low, high, spec)) - ends)
        assert error[1] <= 1.01 * (high - low) / (2**bits - 2)
        assert error[0] <= (0.01 + 1.01 / (2**bits - 2)) * (high - low)  # a log quantizer reaches zero as nearly as it can


@NAMED
def test_onnx_runtime_agrees_code_by_code(name: str, bits: int, options: dict[str, object]) -> None:
    spec = spec_of(name, bits, options)
    for low, high in ranges(name):
        params = quantizer_for(spec).from_range(low, high, spec)
        x = samples(low, high)
        graph = graph_of("g (float[N] x) => (float[N] y) { y = Identity(x) }")
        source = graph.find("Identity")[0].outputs[0]
        result = quantize_activation(graph, source, params)
        graph.set_outputs([graph.find("QuantizeLinear")[0].outputs[0], result])
        result.dtype = np.dtype(np.float32)
        codes, values = run_model(graph, {"x": x})
        agree_but_for_ties(codes, x, params)
        np.testing.assert_allclose(
            values[codes == quantize(x, params)], fake_quantize(x, params)[codes == quantize(x, params)], rtol=2e-6, atol=1e-6
        )


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "affine"])
def test_onnx_runtime_agrees_after_softmax(name: str, optimize: bool) -> None:
    for options in OPTIONS.get(name, [{}]):
        spec = spec_of(name, 4, options)
        params = quantizer_for(spec).from_range(0.0, 1.0, spec)
        graph = graph_of("g (float[B, 9] x) => (float[B, 9] y) { y = Softmax<axis = -1>(x) }")
        graph.set_outputs([quantize_activation(graph, graph.outputs[0], params)])
        graph.outputs[0].dtype = np.dtype(np.float32)
        assert (name != "log") or "Softmax" not in [node.op for node in graph.clean().nodes]
        x = np.random.default_rng(1).normal(0, 3, (50, 9)).astype(np.float32)
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        expected = fake_quantize(p.astype(np.float32), params)
        (values,) = run_model(graph, {"x": x}, optimize=optimize)
        differing = ~np.isclose(values, expected, rtol=1e-5, atol=1e-6)
        assert differing.mean() < 0.005  # ties


@given(st.sampled_from([case for case in CASES if case[1] == 4]), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_every_point_of_its_box_is_a_quantizer(case: tuple[str, int, dict[str, object]], place: list[float]) -> None:
    name, bits, options = case
    spec = spec_of(name, bits, options)
    quantizer = quantizer_for(spec)
    for low, high in [*ranges(name), (0.0, 1e-30), (0.0, 0.0)]:
        box = quantizer.box(low, high, spec)
        point = tuple(a + (b - a) * u for (a, b), u in zip(box, place[: len(box)], strict=True))
        params = quantizer.place(point, low, high, spec)
        values = fake_quantize(samples(low, high), params)
        assert np.isfinite(values).all()
        assert len(np.unique(values)) <= 2**bits
