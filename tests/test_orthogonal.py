"""Hadamard matrices, random orthogonal ones, and those that keep the mean."""

import numpy as np
import pytest

from vitq_compiler.orthogonal import apply_along, hadamard, keeping_ones, random_orthogonal

COVERED = (1, 2, 4, 12, 20, 24, 28, 32, 36, 64, 72, 80, 96, 128, 160, 192, 320, 384, 448, 640, 768)
OTHERS = (3, 6, 10, 52, 100)


@pytest.mark.parametrize("order", COVERED)
def test_hadamard(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix.astype(int) @ matrix.T.astype(int), order * np.eye(order))


@pytest.mark.parametrize("order", [3, 6, 10, 15])
def test_orders_without_one(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("order", COVERED + OTHERS)
def test_rotations_that_keep_ones_commute_with_normalization(order: int) -> None:
    """LN(u R) = LN(u) R without an affine, through side by side copies as well."""
    random = np.random.default_rng(0)
    rotation = keeping_ones(random_orthogonal(order, random))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(order), atol=1e-9)
    np.testing.assert_allclose(rotation.sum(0), 1, atol=1e-9)
    np.testing.assert_allclose(rotation.sum(1), 1, atol=1e-9)

    def normalized(u: np.ndarray) -> np.ndarray:
        return (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-6)

    u = (random.normal(size=(5, 4, order)) * np.exp(random.normal(size=order)) + 2).astype(np.float64)
    np.testing.assert_allclose(normalized(u @ rotation), normalized(u) @ rotation, atol=1e-6)
    merged, turned = u.reshape(5, -1), (u @ rotation).reshape(5, -1)
    np.testing.assert_allclose(normalized(turned), apply_along(normalized(merged), 1, rotation), atol=1e-5)


def test_a_seed_gives_the_same_matrix() -> None:
    one, two, other = (random_orthogonal(64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("order", [64, 192, 384, 10])
def test_one_outlier_channel_is_spread(order: int) -> None:
    """Kurtosis of one outlier falls from the order to near that of a normal sample."""
    u = np.zeros((1, order))
    u[0, 3] = 10.0
    turned = u @ keeping_ones(random_orthogonal(order, np.random.default_rng(0)))
    assert np.abs(turned).max() < 0.75 * 10


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_apply_along_an_axis(axis: int) -> None:
    random = np.random.default_rng(0)
    rotation = random_orthogonal(4, random)
    x = random.normal(size=(4, 8, 12)).astype(np.float32)
    blocks = np.kron(np.eye(x.shape[axis] // 4), rotation)
    expected = np.moveaxis(np.moveaxis(x, axis, -1) @ blocks, -1, axis)
    turned = apply_along(x, axis, rotation)
    np.testing.assert_allclose(turned, expected, atol=1e-6)
    assert turned.dtype == np.float32
