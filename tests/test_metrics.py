"""Distances between arrays."""

import numpy as np
import pytest

from vitq_compiler.metrics import agreement, cosine, max_relative_error, sqnr, varies


def test_sqnr_of_known_noise() -> None:
    signal = np.array([3.0, 4.0])
    assert sqnr(signal, signal + np.array([0.3, 0.4])) == pytest.approx(20.0)
    assert sqnr(signal, signal) == float("inf")
    assert sqnr(np.zeros(2), np.ones(2)) == float("-inf")


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_sqnr_of_what_is_no_number(broken: float) -> None:
    """All noise: below every gate, which a NaN would not be."""
    assert sqnr(np.array([3.0, 4.0]), np.array([3.0, broken])) == float("-inf")
    assert sqnr(np.array([3.0, broken]), np.array([3.0, 4.0])) == float("-inf")


def test_cosine() -> None:
    assert cosine(np.array([1.0, 0.0]), np.array([2.0, 0.0])) == pytest.approx(1.0)
    assert cosine(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(0.0)
    assert cosine(np.zeros(3), np.zeros(3)) == 1.0
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


def test_agreement_of_logits_and_of_class_ids() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 9.0], [5.0, 1.0]])
    other = logits.copy()
    other[3] = [1.0, 5.0]
    assert agreement(logits, other) == pytest.approx(0.75)
    ids = np.array([[1, 2], [3, 4]])
    assert agreement(ids, np.array([[1, 2], [3, 5]])) == pytest.approx(0.5)
    assert agreement(np.zeros((2, 3, 4)), np.zeros((2, 3, 4))) is None


def test_max_relative_error() -> None:
    assert max_relative_error(np.array([1.0, -4.0]), np.array([1.0, -3.0])) == pytest.approx(0.25)
    assert max_relative_error(np.zeros(2), np.ones(2)) == 1.0
    assert max_relative_error(np.ones(2), np.array([1.0, np.nan])) == float("inf")
    assert max_relative_error(np.ones(2), np.ones(3)) == float("inf")


def test_whether_samples_vary() -> None:
    still = np.ones((4, 3), np.float32)
    moved = still.copy()
    moved[2, 1] += 1e-3
    assert (varies(still), varies(moved), varies(still + 1e-8 * np.arange(4)[:, None])) == (False, True, False)
    assert varies(np.zeros((1, 3))), "of a single sample nobody can tell"
    assert varies(np.full((2, 3), np.nan)), "what is not finite is told elsewhere"
    assert not varies(np.zeros((3, 2), np.int64))
