"""Scales of a weight, clipped where that costs the output less than a coarser step would.

Where neighbouring codes have a limit to keep to, a scale grows instead (see `pairs.widen`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.pairs import widen
from vitq_compiler.quant import QuantParams, QuantSpec, fake_quantize, from_range

SHRINKS = tuple(np.linspace(1.0, 0.5, 21))


def fit_scales(weight: NDArray[np.floating[Any]], spec: QuantSpec, energy: NDArray[np.floating[Any]]) -> QuantParams:
    """Parameters that minimize sum_i energy_i (w_i - v_i)^2, v the rounded weight, for each output or all together.

    Ranges from 1 down to half of the weight's own are tried; with a pair limit none is clipped.

    Args:
        weight: [inputs, outputs].
        spec: what it becomes.
        energy: mean square of each input, [inputs].
    """
    per_channel = spec.granularity == "per_channel"
    axes = 0 if per_channel else None
    low, high, axis = weight.min(axes), weight.max(axes), 1 if per_channel else None
    if spec.pair_limit:
        return widened(weight, from_range(low, high, spec, axis), energy)
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
        best = choose(wins, params, best)
    assert best is not None
    return best


def choose(which: NDArray[np.bool_], first: QuantParams, second: QuantParams) -> QuantParams:
    """``first`` for the outputs where ``which`` holds, else ``second``; as a whole where there is one scale for all."""
    if first.axis is None:
        return first if which.all() else second
    scale, zero_point = (np.where(which, a, b) for a, b in ((first.scale, second.scale), (first.zero_point, second.zero_point)))
    return replace(first, scale=scale, zero_point=zero_point)


def widened(weight: NDArray[np.floating[Any]], params: QuantParams, energy: NDArray[np.floating[Any]]) -> QuantParams:
    """``params`` with the scales at which the pair limit, if there is one, costs the output least; arguments as of `fit_scales`."""
    if params.pairs is None:
        return params
    return replace(params, scale=widen(weight, params.scale, params.pairs.limit, energy))
