"""Rounding for the output's sake: its limits are known methods, and its loss is checked by hand and by search."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitq_compiler.quant import QuantParams, QuantSpec, dequantize, from_range, quantize
from vitq_compiler.rounding import BLOCK, flip, second_order

Matrix = NDArray[np.float64]
SPEC = QuantSpec(4, signed=True, symmetric=True, granularity="per_channel")


def problem(inputs: int, outputs: int, seed: int = 0, spec: QuantSpec = SPEC) -> tuple[Matrix, QuantParams, Matrix]:
    """A weight, its quantizer, and inputs that are correlated, [500, inputs]."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(inputs, outputs))
    x = random.normal(size=(500, inputs)) @ random.normal(size=(inputs, inputs))
    return weight, from_range(weight.min(0), weight.max(0), spec, 1), x


def loss(x: Matrix, weight: Matrix, other: Matrix) -> float:
    return float(np.square(x @ (weight - other)).sum())


@pytest.mark.parametrize("reorder", [False, True])
def test_without_correlation_it_rounds_to_nearest(reorder: bool) -> None:
    weight, params, _ = problem(12, 5)
    codes = second_order(weight, params, np.eye(12), damping=0, reorder=reorder)
    np.testing.assert_array_equal(codes, quantize(weight, params))


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(3, granularity="per_channel")])
@pytest.mark.parametrize("inputs", [10, BLOCK + 30])
def test_it_beats_nearest_on_correlated_inputs(inputs: int, spec: QuantSpec) -> None:
    weight, params, x = problem(inputs, 6, spec=spec)
    nearest = loss(x, weight, dequantize(quantize(weight, params), params))
    codes = second_order(weight, params, x.T @ x)
    assert loss(x, weight, dequantize(codes, params)) < 0.8 * nearest
    assert codes.dtype == params.dtype
    assert codes.min() >= params.quant_min
    assert codes.max() <= params.quant_max


def test_feedback_by_hand() -> None:
    """Two inputs that always agree: what the first row loses, the second makes good."""
    params = QuantParams(np.float32([1]), np.int32([0]), 1, -8, 7)
    codes = second_order(np.array([[0.4], [0.4]]), params, np.ones((2, 2)), damping=1e-6)
    np.testing.assert_array_equal(codes, [[0], [1]])


def test_blocks_change_nothing() -> None:
    """Rows rounded across a block boundary get the same feedback as in the plain algorithm."""
    weight, params, x = problem(BLOCK + 20, 3)
    hessian, d = x.T @ x, np.random.default_rng(1).normal(size=x.shape) / 10
    cross = d.T @ x
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    carried = np.triu(cross @ upper.T, 1) @ upper
    rows, plain = weight.copy(), np.empty(weight.shape)
    for i in range(len(rows)):
        row = rows[i].copy()
        plain[i] = dequantize(quantize(row[None], params), params)[0]
        rows[i:] -= np.outer(upper[i, i:], (row - plain[i]) / upper[i, i])
        rows[i:] += np.outer(carried[i, i:], weight[i])
    codes = second_order(weight, params, hessian, cross=cross, damping=0, reorder=False)
    np.testing.assert_allclose(dequantize(codes, params), plain, rtol=1e-6)


def test_without_input_error_gptaq_is_gptq() -> None:
    weight, params, x = problem(16, 4)
    both = [second_order(weight, params, x.T @ x, cross=cross) for cross in (None, np.zeros((16, 16)))]
    np.testing.assert_array_equal(*both)


def test_gptaq_makes_good_what_the_inputs_lost() -> None:
    weight, params, x = problem(24, 6)
    other = np.round(x / 3) * 3
    wanted = x @ weight
    losses = [
        float(np.square(wanted - other @ dequantize(second_order(weight, params, other.T @ other, cross=cross), params)).sum())
        for cross in (None, (x - other).T @ other)
    ]
    assert losses[1] < losses[0]


def test_dead_inputs_do_no_harm() -> None:
    weight, params, x = problem(8, 3)
    x[:, 2] = 0
    codes = second_order(weight, params, x.T @ x)
    np.testing.assert_array_equal(codes[2], quantize(weight, params)[2])


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_flips_only_help_and_end_where_no_move_helps(seed: int) -> None:
    weight, params, x = problem(6, 3, seed)
    hessian, start = x.T @ x, quantize(weight, params)
    goal = hessian @ weight
    moved = flip(start, params, goal, hessian, 1000)
    before, after = (loss(x, weight, dequantize(c, params)) for c in (start, moved))
    assert after <= before * (1 + 1e-9)
    for i, j, step in product(range(6), range(3), (-1, 1)):
        other = moved.astype(int)
        other[i, j] += step
        if params.quant_min <= other[i, j] <= params.quant_max:
            assert loss(x, weight, dequantize(other.astype(np.int8), params)) >= after * (1 - 1e-6)
    assert np.abs(flip(start, params, goal, hessian, 1).astype(int) - start).sum(0).max() <= 1
