"""Learned clipping: gradients, the best iterate, and what it must not do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitq_compiler.clipping import _loss, learn_clipping

RANDOM = np.random.default_rng(0)
CHANNELS = 6


def layer(rows: int = 600, outlier: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with a rare outlier in every channel, and W W^T of a weight that does not listen to channel 0."""
    x = RANDOM.standard_normal((rows, CHANNELS)) * np.array([1, 5, 0.1, 1, 2, 3])
    x[0] *= outlier
    weight = RANDOM.standard_normal((CHANNELS, 9))
    weight[0] = 0
    return x, weight @ weight.T


def ends_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.min(0), x.max(0)


@pytest.mark.parametrize("bits", [3, 4])
def test_it_lowers_the_error_of_the_output(bits: int) -> None:
    x, gram = layer()
    start = ends_of(x)
    learned = learn_clipping(x, gram, start, bits)
    before, after = (_loss(x, np.stack(ends), gram, bits)[0] for ends in (start, learned))
    assert after < 0.8 * before
    assert all((learned[0][1:] > start[0][1:]) | (learned[1][1:] < start[1][1:]))


@given(st.integers(2, 6), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_never_worse_than_the_start_and_never_wider(bits: int, steps: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((40, CHANNELS)) + random.uniform(-3, 3, CHANNELS)  # some channels with one sign
    gram = np.cov(random.standard_normal((CHANNELS, 20)))
    start = tuple(np.quantile(x, q, axis=0) for q in (0.02, 0.98))
    low, high = learn_clipping(x, gram, start, bits, steps)  # type: ignore[arg-type]
    assert _loss(x, np.stack([low, high]), gram, bits)[0] <= _loss(x, np.stack(start), gram, bits)[0] * (1 + 1e-5)
    assert (low >= x.min(0) - 1e-5).all()
    assert (high <= x.max(0) + 1e-5).all()
    assert (low <= high).all()


def test_slopes_are_those_of_the_loss_where_values_are_cut_off() -> None:
    """With every value beyond an end the loss is smooth, and finite differences must agree."""
    x = np.concatenate([np.full((5, 2), -4.0), np.full((7, 2), 6.0)])
    gram, ends = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[-1.0, -2.0], [3.0, 2.0]])
    _, slopes = _loss(x, ends, gram, 4)
    for i in range(2):
        for j in range(2):
            moved = ends.copy()
            moved[i, j] += 1e-5
            back = ends.copy()
            back[i, j] -= 1e-5
            assert slopes[i, j] == pytest.approx((_loss(x, moved, gram, 4)[0] - _loss(x, back, gram, 4)[0]) / 2e-5, rel=1e-6)


def test_a_constant_channel_keeps_its_range() -> None:
    x, gram = layer()
    x[:, 2] = 1.5
    low, high = learn_clipping(x, gram, ends_of(x), 4)
    assert (low[2], high[2]) == (1.5, 1.5)
