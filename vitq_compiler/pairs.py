"""Weight codes whose products a 16-bit sum can hold, as x86 CPUs without VNNI need them.

    y[m, n] = sum_i sat16(a[m, 2i] w[2i, n] + a[m, 2i+1] w[2i+1, n])          a: uint8 codes, w: int8 codes

The instruction ``vpmaddubsw`` adds two neighbouring products in int16 and cuts the sum off at its ends (Intel Intrinsics Guide,
_mm256_maddubs_epi16); everything after that is exact. A pair sums to most where both weights have one sign and both activations are
the largest code A. So nothing is ever cut off where every pair of neighbours satisfies

    |w[2i, n] + w[2i+1, n]| <= floor(32767 / A)

Weights of unlike sign always do, as do all weights of at most 7 bits around zero. Zero points enter as sums outside the pairs. The
published relative is accumulator-aware quantization in tiles (AXE, arXiv 2409.17092), with tiles of two and 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]

INT16 = np.iinfo(np.int16)
FACTORS = tuple(np.arange(1.0, 2.02, 0.04))  # by which a scale may grow; at 2 every pair fits


def pair_limit(highest: int) -> int:
    """Largest magnitude that two neighbouring weight codes may sum to, where activation codes go up to ``highest``."""
    return int(INT16.max) // highest


@dataclass(frozen=True)
class Pairs:
    """Which codes of a weight are neighbours, and what two of them may sum to.

    Attributes:
        limit: largest magnitude of the sum of two neighbours, see `pair_limit`.
        walk: the axes that the kernel walks through, the slowest first; the other axis is that of the outputs. (0,) for the weight
            [inputs, outputs] of a product, (2, 3, 1) for the kernel [outputs, inputs, height, width] of a convolution.
    """

    limit: int
    walk: tuple[int, ...] = (0,)

    def hold(self, codes: Array, wanted: Floats) -> Array:
        """``codes`` with every pair beyond the limit replaced by the nearest allowed one.

        Args:
            codes: ``wanted`` rounded and clipped.
            wanted: the weight in steps, of the same shape: codes before rounding, zero at code 0.
        """
        rows = _paired(np.moveaxis(codes, self.walk, range(len(self.walk))), len(self.walk))
        pair, channel = np.nonzero(np.abs(rows[:, 0] + rows[:, 1]) > self.limit)
        if not pair.size:
            return codes
        first, second = (_paired(np.moveaxis(wanted, self.walk, range(len(self.walk))), len(self.walk))[pair, i, channel] for i in (0, 1))
        rows[pair, 0, channel] = nearest_first(first, second, self.limit)
        rows[pair, 1, channel] = np.sign(first + second) * self.limit - rows[pair, 0, channel]
        order = [*self.walk, *(axis for axis in range(codes.ndim) if axis not in self.walk)]
        moved = rows.reshape(-1, rows.shape[-1])[: codes.size // rows.shape[-1]].reshape([codes.shape[axis] for axis in order])
        return np.asarray(np.moveaxis(moved, range(codes.ndim), order), codes.dtype)

    def violations(self, codes: Array) -> int:
        """How many pairs of ``codes`` sum to more than the limit."""
        rows = np.moveaxis(codes, self.walk, range(len(self.walk)))
        sums = pair_sums(rows.reshape(int(np.prod(rows.shape[: len(self.walk)])), -1))
        return int(np.count_nonzero(np.abs(sums) > self.limit))


def nearest_first(first: Floats, second: Floats, limit: int, *, stiffness: Floats | float = 1.0, feedback: Floats | float = 0.0) -> Floats:
    """The first code of the pair nearest to (first, second) among those that sum to the limit; the second code is what is left of it.

        min  (first - c)^2 + stiffness (second - feedback (first - c) - (limit - c))^2

    Args:
        first, second: what is wanted, in steps; their sum exceeds the limit in magnitude.
        limit: the magnitude of the sum.
        stiffness: what an error of the second costs, in units of what one of the first costs.
        feedback: how much of an error of the first the second makes good.
    """
    sign = np.sign(first + second)
    excess = np.abs(first + second) - limit
    given = excess * (1 + feedback) * stiffness / (1 + np.square(1 + feedback) * stiffness)
    most = np.iinfo(np.int8).max
    return np.asarray(sign * np.clip(np.rint(sign * first - given), limit - most, most))


def widen(weight: Floats, scale: Floats, limit: int, energy: Floats) -> NDArray[np.float32]:
    """Scales at which rounding and the limit together cost least.

        min over s    s^2 / 12 sum_k h_k  +  sum over pairs  h_p (|w_2i + w_2i+1| - limit s)^2 where that is positive

    The first term is the noise of rounding; the second is what moving a pair to the limit costs, h_p = h_2i h_2i+1 / (h_2i + h_2i+1).

    Args:
        weight: [inputs, outputs].
        scale: to start from, shape [] or [outputs]; none becomes smaller, none more than twice as large.
        limit: of the sum of two codes.
        energy: h, mean square of each input about its mean, [inputs].
    """
    rows, loudness = _paired(weight, 1), _paired(np.asarray(energy, np.float64)[:, None], 1)
    sums = np.abs(rows[:, 0] + rows[:, 1])
    pair, channel = np.nonzero(sums > limit * scale)
    sums = sums[pair, channel]
    a, b = loudness[pair, 0, 0], loudness[pair, 1, 0]
    cost = np.divide(a * b, a + b, out=np.zeros_like(a), where=a + b > 0)
    outputs = weight.shape[1]
    best, least = np.broadcast_to(scale, outputs).astype(np.float64), np.full(outputs, np.inf)
    for factor in FACTORS:
        tried = np.broadcast_to(np.float64(scale) * factor, outputs)
        beyond = np.maximum(sums - limit * tried[channel], 0)
        loss = np.square(tried) / 12 * loudness.sum() + np.bincount(channel, cost * np.square(beyond), outputs)
        if scale.ndim == 0:
            loss = np.full(outputs, loss.sum())
        best, least = np.where(loss < least, tried, best), np.minimum(loss, least)
    return np.asarray(best if scale.ndim else best[0], np.float32)


def partners(codes: Array) -> Array:
    """The neighbour of every code of a weight [inputs, outputs]; 0 where it has none."""
    return _paired(codes, 1)[:, ::-1].reshape(-1, codes.shape[1])[: len(codes)]


def pair_sums(codes: NDArray[np.int8]) -> NDArray[np.int16]:
    """The sum of each pair of neighbours in a weight [inputs, outputs]: [pairs, outputs].

    It tells all there is to know: only where both codes have one sign can it exceed 127 in magnitude, and every limit is above that.
    """
    pairs = _paired(codes, 1)
    return np.add(pairs[:, 0], pairs[:, 1], dtype=np.int16)


def saturating_product(activation: NDArray[np.uint8], weight: NDArray[np.int8]) -> NDArray[np.int32]:
    """What the kernel computes: [rows, inputs] by [inputs, outputs], with each pair of products cut off at the ends of int16."""
    a = _paired(np.ascontiguousarray(activation.T).astype(np.int32), 1)
    w = _paired(weight.astype(np.int32), 1)
    total = np.zeros((activation.shape[0], weight.shape[1]), np.int32)
    for codes, weights in zip(a, w, strict=True):
        total += np.clip(codes.T @ weights, INT16.min, INT16.max)
    return total


def _paired(array: Array, axes: int) -> Array:
    """The first ``axes`` axes as pairs, the others as one: [pairs, 2, rest], a copy; a zero stands beside a last row without partner."""
    rows = array.reshape(int(np.prod(array.shape[:axes])), -1)
    return np.pad(rows, ((0, len(rows) % 2), (0, 0))).reshape(-1, 2, rows.shape[1])
