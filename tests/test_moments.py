"""Moments stand for the samples: every figure is that of the samples themselves."""

import numpy as np
import pytest

from vitq_compiler.moments import Moments

RANDOM = np.random.default_rng(0)
X = (RANDOM.normal(size=(300, 6)) @ RANDOM.normal(size=(6, 6)) + RANDOM.normal(size=6)).astype(np.float32)
OTHER = np.round(X).astype(np.float32)  # what quantization left of it
W, BIAS = RANDOM.normal(size=(6, 4)), RANDOM.normal(size=4)
V = np.round(W * 2) / 2


def moments(other: np.ndarray = OTHER) -> Moments:
    batches = np.array_split(np.arange(300), 4)
    return Moments.gather((X[b].reshape(3, -1, 6), other[b].reshape(3, -1, 6)) for b in batches)


def test_the_error_is_that_of_the_samples_under_the_best_bias() -> None:
    m = moments()
    assert m.rows == 300
    bias = BIAS + m.bias_offset(W, V)
    difference = X @ W + BIAS - (OTHER @ V + bias)
    np.testing.assert_allclose(difference.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(m.error(W, V), np.square(difference).mean(0), rtol=1e-4)


def test_batches_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments, and those of the halves, are the same whatever is multiplied at a time."""
    pairs = [(x, np.round(x)) for x in np.split(X, 6)]
    found = []
    for rows in (1, 120, 10**6):
        monkeypatch.setattr("vitq_compiler.moments.ROWS", rows)
        found.append(Moments.gather(iter(pairs), halves=True))
    for other in found[1:]:
        assert other.halves is not None
        assert found[0].halves is not None
        for a, b in zip((found[0], *found[0].halves), (other, *other.halves), strict=True):
            assert a.rows == b.rows
            for one, two in zip(a.sums, b.sums, strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-3)


def test_regression_without_penalty_is_least_squares() -> None:
    design = np.c_[OTHER, np.ones(300)]
    expected = np.linalg.lstsq(design, X @ W, rcond=None)[0][:-1]
    np.testing.assert_allclose(moments().regress(W, 0), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10])
def test_regression_is_stationary_and_never_worse(strength: float) -> None:
    m = moments()
    found = m.regress(W, strength)
    penalty = strength * np.trace(m.other_covariance) / 6
    np.testing.assert_allclose(m.other_covariance @ found - m.cross @ W + penalty * (found - W), 0, atol=1e-9)
    assert (m.error(W, found) + penalty * np.square(found - W).sum(0) <= m.error(W, W)).all()


def test_regression_without_error_or_with_all_penalty_changes_nothing() -> None:
    np.testing.assert_allclose(moments(X).regress(W, 0), W, atol=1e-4)
    np.testing.assert_allclose(moments().regress(W, 1e9), W, atol=1e-6)


def test_inputs_that_never_vary() -> None:
    other = OTHER.copy()
    other[:, 3] = 7
    assert np.isfinite(moments(other).regress(W, 0)).all()


def test_the_affine_is_the_best_factor() -> None:
    m = moments()
    factor = m.affine(W, V)
    best = m.error(W, V * factor)
    for other in (factor * 0.98, factor * 1.02, np.ones(4)):
        assert (best <= m.error(W, V * other) + 1e-12).all()
    np.testing.assert_allclose(moments(X).affine(W, W), 1, rtol=1e-6)
    np.testing.assert_allclose(m.affine(W, 5 * W), 0.5)
    np.testing.assert_allclose(m.affine(W, 0 * W), 1)


def test_halves_are_every_other_batch() -> None:
    random = np.random.default_rng(0)
    pairs = [tuple(random.standard_normal((2, 5, 3)).astype(np.float32) for _ in range(2)) for _ in range(5)]
    whole, plain = Moments.gather(pairs, halves=True), Moments.gather(pairs)  # type: ignore[arg-type]
    assert plain.halves is None
    assert whole.halves is not None
    assert [part.rows for part in whole.halves] == [30, 20]
    for found, expected in ((whole.halves[0], Moments.gather(pairs[::2])), (whole.halves[1], Moments.gather(pairs[1::2])), (whole, plain)):  # type: ignore[arg-type]
        for a, b in zip(found.sums, expected.sums, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert Moments.gather(pairs[:1], halves=True).halves is None  # type: ignore[arg-type]
