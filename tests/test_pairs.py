"""Pairs of weights: limits that hold whatever rounds, the nearest codes within them, and the kernel that they are for."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitq_compiler.pairs import Pairs, nearest_first, pair_limit, pair_sums, partners, saturating_product, widen
from vitq_compiler.quant import QuantParams, QuantSpec, dequantize, from_range, quantize
from vitq_compiler.rounding import BLOCK, feed_back, feedback_factor, flip, second_order
from vitq_compiler.weight_scales import fit_scales

SPEC = QuantSpec(8, signed=True, symmetric=True, granularity="per_channel", pair_limit=128)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10_000))


def weight_of(inputs: int, outputs: int, seed: int) -> NDArray[np.float64]:
    """Weights that fill their codes: a few in a column are as large as the largest."""
    random = np.random.default_rng(seed)
    return np.asarray(np.clip(random.normal(size=(inputs, outputs)) * random.choice([0.3, 1, 3], (inputs, outputs)), -2, 2))


def params_of(weight: NDArray[np.float64], spec: QuantSpec = SPEC) -> QuantParams:
    return from_range(weight.min(0), weight.max(0), spec, 1)


def exact(codes: NDArray[np.int8]) -> bool:
    """Whether no pair of products leaves 16 bits, whatever the activations: the largest and the smallest sum, computed."""
    ends = np.array(list(product((0, 255), repeat=2)), np.uint8)
    tiled = np.tile(ends, (1, -(-len(codes) // 2)))[:, : len(codes)]
    return bool((saturating_product(tiled, codes) == tiled.astype(np.int32) @ codes.astype(np.int32)).all())


@pytest.mark.parametrize(("highest", "limit"), [(255, 128), (127, 258), (15, 2184), (135, 242)])
def test_the_limit_is_the_largest_sum_that_fits(highest: int, limit: int) -> None:
    assert pair_limit(highest) == limit
    assert limit * highest <= 32767 < (limit + 1) * highest


def test_the_kernel_cuts_off_each_pair_and_nothing_else() -> None:
    activation = np.array([[255, 255, 255, 255, 9]], np.uint8)
    weight = np.array([[127, -127], [127, -127], [127, 127], [-127, 1], [3, 3]], np.int8)
    np.testing.assert_array_equal(saturating_product(activation, weight), [[32767 + 27, -32768 + 128 * 255 + 27]])


@given(shapes)
def test_every_way_of_rounding_keeps_to_the_limit(shape: tuple[int, int, int]) -> None:
    inputs, outputs, seed = shape
    weight = weight_of(inputs, outputs, seed)
    x = np.random.default_rng(seed).normal(size=(40, inputs)) @ np.random.default_rng(seed + 1).normal(size=(inputs, inputs))
    hessian, params = x.T @ x, params_of(weight)
    nearest = quantize(weight, params)
    found = [
        nearest,
        quantize(weight, fit_scales(weight, SPEC, np.ones(inputs))),
        second_order(weight, params, hessian),
        second_order(weight, params, hessian, reorder=False, cross=hessian / 10),
        flip(nearest, params, hessian @ weight, hessian, 50),
    ]
    for codes in found:
        assert codes.dtype == np.int8
        assert Pairs(128).violations(codes) == 0
        assert exact(codes)


@given(st.integers(0, 10_000))
def test_a_pair_moves_to_the_nearest_codes_that_fit(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.uniform(60, 127, 2) * random.choice([-1, 1])
    stiffness, feedback = random.uniform(0.1, 10), random.uniform(-0.9, 2)

    def cost(a: float) -> float:
        b = np.sign(first) * 128 - a
        return float((first - a) ** 2 + stiffness * (second - feedback * (first - a) - b) ** 2)

    if abs(first + second) > 128:
        chosen = nearest_first(np.float64(first), np.float64(second), 128, stiffness=stiffness, feedback=feedback)
        assert cost(float(chosen)) == pytest.approx(min(cost(np.sign(first) * a) for a in range(1, 128)))


def test_only_pairs_beyond_the_limit_change() -> None:
    weight = np.array([[100.2], [60], [100], [-100], [-64], [-64], [127]])
    params = QuantParams(np.ones(1, np.float32), np.zeros(1, np.int32), 1, -127, 127, pairs=Pairs(128))
    np.testing.assert_array_equal(quantize(weight, params)[:, 0], [84, 44, 100, -100, -64, -64, 127])


def test_neighbours_in_a_convolution_lie_in_one_position_first() -> None:
    """With three channels a pair crosses from one position to the next."""
    kernel = np.full((1, 3, 1, 2), 100.0)
    params = QuantParams(np.float32(1), np.int32(0), None, -127, 127, pairs=Pairs(128, walk=(2, 3, 1)))
    codes = quantize(kernel, params)
    walked = codes.transpose(2, 3, 1, 0).reshape(-1)
    assert (walked.reshape(3, 2).sum(1) == 128).all()
    assert params.pairs is not None
    assert params.pairs.violations(np.full((1, 3, 1, 2), 100, np.int8)) == 3


def test_sums_and_partners() -> None:
    codes = np.array([[5, -5], [7, 7], [9, -9]], np.int8)
    np.testing.assert_array_equal(pair_sums(codes), [[12, 2], [9, -9]])
    np.testing.assert_array_equal(pair_sums(np.array([[127], [127], [-128], [-128]], np.int8)), [[254], [-256]])
    np.testing.assert_array_equal(partners(codes), [[7, 7], [5, -5], [0, 0]])


@given(shapes)
def test_scales_grow_only_where_that_pays(shape: tuple[int, int, int]) -> None:
    inputs, outputs, seed = shape
    weight = weight_of(inputs, outputs, seed)
    narrow = params_of(weight)
    scale = widen(weight, narrow.scale, 128, np.ones(inputs))
    assert (scale >= narrow.scale).all()
    assert (scale <= narrow.scale * 2.01).all()
    free = np.abs(np.rint(weight / narrow.scale)[: inputs // 2 * 2].reshape(-1, 2, outputs).sum(1)).max(0, initial=0) <= 127
    np.testing.assert_array_equal(scale[free], narrow.scale[free])


def test_wider_scales_lose_less_than_moved_pairs_alone() -> None:
    weight = weight_of(64, 20, 0)
    narrow, wide = params_of(weight), fit_scales(weight, SPEC, np.ones(64))
    losses = [float(np.square(weight - dequantize(quantize(weight, params), params)).sum()) for params in (narrow, wide)]
    assert losses[1] < losses[0] / 10


@pytest.mark.parametrize("inputs", [6, BLOCK + 7])
def test_the_first_of_a_pair_leaves_room_for_the_second(inputs: int) -> None:
    """With feedback the limit costs less than without."""
    random = np.random.default_rng(0)
    x = random.normal(size=(400, inputs)) @ random.normal(size=(inputs, inputs))
    weight = weight_of(inputs, 12, 1)
    params, hessian = fit_scales(weight, SPEC, np.ones(inputs)), x.T @ x
    codes = quantize(weight, params), second_order(weight, params, hessian)
    losses = [float(np.square(x @ (weight - dequantize(c, params))).sum()) for c in codes]
    assert losses[1] < losses[0]


def test_a_stack_is_rounded_as_each_alone() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 50, 8))
    hessian, steps = x.swapaxes(1, 2) @ x, random.uniform(-120, 120, (3, 8, 5))
    params = QuantParams(np.ones(5, np.float32), np.zeros(5, np.int32), 1, -127, 127, pairs=Pairs(128))
    together = feed_back(steps, params, feedback_factor(hessian, 0.01))
    for part, (one, own) in enumerate(zip(steps, hessian, strict=True)):
        np.testing.assert_array_equal(together[part], feed_back(one, params, feedback_factor(own, 0.01)))


def test_a_limit_needs_codes_around_zero() -> None:
    with pytest.raises(ValueError, match="signed symmetric"):
        QuantSpec(8, pair_limit=128)
