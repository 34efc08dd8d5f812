"""Built-in images: deterministic, quick, and with the statistics of photographs."""

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vitq_compiler.builtin_images import dead_leaves

Array = NDArray[Any]


@pytest.fixture(scope="module")
def pictures() -> Array:
    """Sixteen pictures, uint8 [16, 224, 224, 3]."""
    return np.stack([dead_leaves(index, 224, 224) for index in range(16)])


def spectral_slope(picture: Array) -> float:
    """Exponent of the power spectrum over spatial frequency, from 4 cycles a picture to a third of the sampling rate."""
    side = len(picture)
    window = np.hanning(side)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window)) ** 2
    cycles = np.fft.fftfreq(side) * side
    radius = np.hypot(cycles[:, None], cycles[None, :]).round().astype(int)
    radial = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    used = np.arange(4, side // 3)
    return float(np.polyfit(np.log(used), np.log(radial[used]), 1)[0])


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (7, 130), (32, 48)])
def test_shape_and_dtype(size: tuple[int, int]) -> None:
    picture = dead_leaves(3, *size)
    assert picture.shape == (*size, 3)
    assert picture.dtype == np.uint8


def test_same_arguments_same_picture() -> None:
    np.testing.assert_array_equal(dead_leaves(5, 64, 48, seed=9), dead_leaves(5, 64, 48, seed=9))


def test_index_and_seed_make_different_pictures() -> None:
    made = [dead_leaves(index, 64, 64, seed).tobytes() for index in range(6) for seed in range(3)]
    assert len(set(made)) == 18


def test_power_falls_like_that_of_photographs(pictures: Array) -> None:
    # Photographs: near -2, from -1.2 to -3 for single ones (Ruderman 1994; Torralba and Oliva 2003).
    slopes = [spectral_slope(picture) for picture in pictures]
    assert -2.8 < np.mean(slopes) < -1.8
    assert min(slopes) > -3.0
    assert max(slopes) < -1.2


def test_noise_has_no_slope() -> None:
    """The measure itself can tell."""
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    assert abs(spectral_slope(noise)) < 0.3


def test_colours_are_those_of_photographs(pictures: Array) -> None:
    values = pictures / 255.0
    np.testing.assert_allclose(values.mean((0, 1, 2)), [0.485, 0.456, 0.406], atol=0.12)
    np.testing.assert_allclose(values.std((0, 1, 2)), [0.229, 0.224, 0.225], atol=0.06)
    correlation = np.asarray(np.corrcoef(values.reshape(-1, 3).T))
    assert correlation.min() > 0.6, "channels of photographs move together"
    assert correlation[~np.eye(3, dtype=bool)].max() < 0.99, "but the pictures are not grey"


def test_pictures_differ_in_brightness_and_use_the_whole_range(pictures: Array) -> None:
    assert pictures.mean((1, 2, 3)).std() > 12
    assert pictures.min() == 0
    assert pictures.max() == 255
    assert np.isin(pictures, (0, 255)).mean() < 0.15


def test_leaves_hide_each_other() -> None:
    """Most neighbours are alike and a few are far apart: flat leaves with edges, which noise of the same spectrum has not."""
    grey = dead_leaves(1, 224, 224) @ np.array([0.299, 0.587, 0.114])
    steps = np.diff(grey, axis=1).ravel()
    kurtosis = float(np.mean((steps - steps.mean()) ** 4) / np.var(steps) ** 2)
    assert kurtosis > 5.0, "a normal distribution has 3"


def test_quick() -> None:
    dead_leaves(0, 224, 224)
    began = time.process_time()
    for index in range(8):
        dead_leaves(index, 224, 224)
    assert (time.process_time() - began) * 64 / 8 < 1.5 * 2, "64 pictures take under 1.5 seconds; twice that on a busy machine"
