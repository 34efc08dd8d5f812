"""What makes an activation hard to quantize with one scale, as numbers; each is a ratio, free of units.

Arrays are [samples, tokens, channels]. Kurtosis and max/rms are what Bondarenko et al. (arXiv 2306.12929) diagnose with; tokens
far above the others are the registers of Darcet et al. (arXiv 2309.16588).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def kurtosis(x: Array) -> float:
    """E (x - mean)^4 / variance^2 of all numbers: 3 for a normal distribution, about C for one outlier in C; 0 for a constant."""
    centred = np.asarray(x, np.float64) - np.mean(x, dtype=np.float64)
    squares = np.square(centred, out=centred)
    return _ratio(float(np.mean(np.square(squares))), float(np.mean(squares)) ** 2)


def peak(x: Array) -> float:
    """max |x| / rms: 1 where all are equally large, sqrt(C) for one outlier in C."""
    return _ratio(float(np.abs(x).max()), float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))))


def channel_spread(x: Array) -> float:
    """Largest width (max - min) of a channel over the median width; channels that never change do not count."""
    widths = _widths(x)
    return _ratio(float(widths.max()), _median_width(widths))


def channel_offset(x: Array) -> float:
    """Largest |mean| of a channel over the median width: above 1, a range holds more offset than signal."""
    return _ratio(float(np.abs(x.mean((0, 1), dtype=np.float64)).max()), _median_width(_widths(x)))


def token_spread(x: Array) -> float:
    """max |x| of the top token over that of the median token of its sample; of the worst sample."""
    tops = np.abs(x).max(2)
    return max(_ratio(float(top.max()), float(np.median(top))) for top in tops)


def sink_mass(probs: Array) -> NDArray[np.float64]:
    """Probability that all queries together put on one key, by head: the mean over samples of max_key mean_query P.

    A head near 1 looks at the same token whatever it is asked, as heads do that have nothing to add. Zero where there is a
    single query or a single key, of which this says nothing.

    Args:
        probs: [samples, heads, queries, keys].
    """
    if 1 in probs.shape[2:]:
        return np.zeros(probs.shape[1])
    return np.asarray(probs.mean(2, dtype=np.float64).max(-1).mean(0))


def _widths(x: Array) -> Array:
    return np.asarray(x.max((0, 1)) - x.min((0, 1)), np.float64)


def _median_width(widths: Array) -> float:
    moving = widths[widths > 0]
    return float(np.median(moving)) if moving.size else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
