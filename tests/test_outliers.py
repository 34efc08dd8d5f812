"""Measures of outliers on arrays of which they are known."""

import numpy as np
import pytest

from vitq_compiler import outliers
from vitq_compiler.orthogonal import random_orthogonal

RANDOM = np.random.default_rng(0)
NORMAL = RANDOM.standard_normal((4, 50, 64))


def test_kurtosis_of_known_distributions() -> None:
    assert outliers.kurtosis(NORMAL) == pytest.approx(3, abs=0.15)
    assert outliers.kurtosis(RANDOM.uniform(size=(4, 50, 64))) == pytest.approx(1.8, abs=0.05)
    assert outliers.kurtosis(np.ones((1, 2, 3))) == 0


@pytest.mark.parametrize("channels", [64, 256])
def test_one_outlier_channel_and_its_rotation(channels: int) -> None:
    x = np.zeros((1, 1, channels), np.float32)
    x[..., 5] = 7
    assert outliers.kurtosis(x) == pytest.approx(channels, rel=0.05)
    assert outliers.peak(x) == pytest.approx(channels**0.5)
    rotated = x @ random_orthogonal(channels, RANDOM)  # a Hadamard matrix: all as large as each other
    assert outliers.kurtosis(rotated) == pytest.approx(1, abs=0.2)
    assert outliers.peak(rotated) == pytest.approx(1)


def test_an_outlier_channel_among_normal_ones_is_rotated_away() -> None:
    x = NORMAL.copy()
    x[..., 9] *= 40
    assert outliers.kurtosis(x) > 50
    assert outliers.channel_spread(x) == pytest.approx(40, rel=0.5)
    rotated = x @ random_orthogonal(64, RANDOM)
    assert outliers.kurtosis(rotated) < 6
    assert outliers.channel_spread(rotated) < 2


def test_offset_is_counted_in_widths_of_channels() -> None:
    x = RANDOM.uniform(-0.5, 0.5, (2, 200, 8))
    assert outliers.channel_offset(x) < 0.1
    x[..., 3] += 6
    assert outliers.channel_offset(x) == pytest.approx(6, rel=0.05)
    assert outliers.channel_spread(x) == pytest.approx(1, rel=0.05)


def test_channels_that_never_change_do_not_make_the_median() -> None:
    x = np.zeros((1, 10, 5))
    assert outliers.channel_spread(x) == outliers.channel_offset(x) == 0
    x[0, :, 0] = np.arange(10)
    assert outliers.channel_spread(x) == 1


def test_a_register_stands_out() -> None:
    x = np.clip(NORMAL, -2, 2)
    assert outliers.token_spread(x) < 2
    x[2, 17, 4] = 60  # in one sample of four
    assert outliers.token_spread(x) == pytest.approx(30, rel=0.1)


def test_a_head_that_looks_at_one_key_does_nothing() -> None:
    probs = np.full((3, 4, 10, 10), 0.1)
    probs[:, 2] = 0
    probs[:, 2, :, 7] = 1  # every query, key 7
    probs[:, 3] = np.eye(10)  # sharp, but every query looks elsewhere
    assert outliers.sink_mass(probs) == pytest.approx([0.1, 0.1, 1, 0.1])
    assert not outliers.sink_mass(probs[:, :, :1]).any()
