"""Ranges of single channels, learned by the error of what the next Linear gives out.

    low' = middle - sigmoid(a) (middle - low),   high' = middle + sigmoid(b) (high - middle)
    min over a, b   |(x' - x) W|^2,   x' = x quantized channel by channel in [low', high']

The dual clipping of RepQuant (arXiv 2402.05628): two numbers for each channel, the middle being zero where the channel has both
signs. Its parametrization could not be verified; this one has what its text states. x' = low' + s v', with v = (x - low') / s, v' its
nearest code and s = (high' - low') / (codes - 1), has the straight-through gradients (v - v') / (codes - 1) for low' and
(v' - v) / (codes - 1) for high'; a value beyond an end moves with that end. The loss needs no sample of the output: it is
tr(E W W^T E^T) with the error E = x' - x.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]
STEPS, RATE = 100, 0.05  # of Adam, in logits: enough to go from the whole range to a third of it
FIRST = 0.98  # a start at the very end of a sigmoid would not move
DECAYS, TINY = (0.9, 0.999), 1e-8


def learn_clipping(
    x: NDArray[Any], gram: NDArray[Any], ends: tuple[Vector, Vector], bits: int, steps: int = STEPS
) -> tuple[Vector, Vector]:
    """Ranges of each channel, within its observed one; the best seen, and none worse than the ones to start from.

    Args:
        x: samples, [rows, channels].
        gram: W W^T of all weights that read x, [channels, channels].
        ends: ranges to start from, each [channels].
        bits: of the codes.
        steps: of descent.
    """
    low, high = x.min(0), x.max(0)
    middle = np.where((low < 0) & (high > 0), 0, (low + high) / 2)
    reach = np.stack([low - middle, high - middle])
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.where(reach != 0, (np.stack(ends) - middle) / reach, 1.0)
    kept = np.clip(kept, 1 - FIRST, FIRST)
    logits, adam = np.log(kept / (1 - kept)), _Adam()
    best, least = np.stack(ends), _loss(x, np.stack(ends), gram, bits)[0]
    for _ in range(steps):
        kept = 1 / (1 + np.exp(-logits))
        now = middle + kept * reach
        loss, slopes = _loss(x, now, gram, bits)
        if loss < least:
            best, least = now, loss
        logits = logits - adam.step(slopes * kept * (1 - kept) * reach / max(loss, 1e-30))
    return best[0].astype(np.float32), best[1].astype(np.float32)


def _loss(x: NDArray[Any], ends: NDArray[Any], gram: NDArray[Any], bits: int) -> tuple[float, NDArray[Any]]:
    """The loss at ``ends`` [2, channels], and its slopes there."""
    last = 2**bits - 1
    low, step = ends[0], np.maximum((ends[1] - ends[0]) / last, 1e-12)
    v = (x - low) / step
    codes = np.clip(np.rint(v), 0, last)
    error = low + step * codes - x
    pull = error @ gram
    below, above = v < 0, v > last
    rounding = np.where(below | above, 0, (codes - v) / last)
    slopes = np.stack([(pull * np.where(below, 1, -rounding)).sum(0), (pull * np.where(above, 1, rounding)).sum(0)])
    return float(np.vdot(pull, error)), 2 * slopes


@dataclass
class _Adam:
    """Adam (arXiv 1412.6980) for one array."""

    count: int = 0
    moments: list[Any] = field(default_factory=lambda: [0.0, 0.0])

    def step(self, slope: NDArray[Any]) -> NDArray[Any]:
        """How far to go against ``slope``."""
        self.count += 1
        for i, power in enumerate((slope, slope**2)):
            self.moments[i] = DECAYS[i] * self.moments[i] + (1 - DECAYS[i]) * power
        mean, square = (moment / (1 - decay**self.count) for moment, decay in zip(self.moments, DECAYS, strict=True))
        return np.asarray(RATE * mean / (np.sqrt(square) + TINY))
