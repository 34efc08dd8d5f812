"""Scales of a weight, clipped where that costs the output less than a coarser step would."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.quant import QuantParams, QuantSpec, fake_quantize, from_range

SHRINKS = tuple(np.linspace(1.0, 0.5, 21))


def fit_scales(weight: NDArray[np.floating[Any]], spec: QuantSpec, energy: NDArray[np.floating[Any]]) -> QuantParams:
    """Parameters that minimize sum_i energy_i (w_i - v_i)^2, v the rounded weight, for each output or all together.

    Ranges from 1 down to half of the weight's own are tried.

    Args:
        weight: [inputs, outputs].
        spec: what it becomes.
        energy: mean square of each input, [inputs].
    """
    per_channel = spec.granularity == "per_channel"
    axes = 0 if per_channel else None
    low, high, axis = weight.min(axes), weight.max(axes), 1 if per_channel else None
    best: QuantParams | None = None
    least = np.full(np.shape(low), np.inf)
    for shrink in SHRINKS:
        params = from_range(low * shrink, high * shrink, spec, axis)
        loss = (energy[:, None] * np.square(weight - fake_quantize(weight, params))).sum(axes)
        if best is None:
            best, least = params, loss
            continue
        wins = loss < least
        least = np.minimum(loss, least)
        scale = np.where(wins, params.scale, best.scale).astype(np.float32)
        best = QuantParams(scale, np.where(wins, params.zero_point, best.zero_point).astype(np.int32), axis, best.quant_min, best.quant_max)
    assert best is not None
    return best
