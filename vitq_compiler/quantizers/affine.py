"""Codes at equal distances: QuantizeLinear and DequantizeLinear as they are.

Lower and upper end of the range are searched apart: cutting the flat negative end of a GELU output together with its long
positive one costs far more than either gains.
"""

from __future__ import annotations

import numpy as np

from vitq_compiler.quant import QuantParams, QuantSpec, from_range
from vitq_compiler.quantizer import NARROWEST, Box, Point, Quantizer


class Affine(Quantizer):
    """scale * (code - zero_point)"""

    name = "affine"
    plain = True

    def box(self, low: float, high: float, spec: QuantSpec) -> Box:
        if spec.symmetric:
            return ((NARROWEST, 0.0),)
        return tuple((NARROWEST, 0.0) for end in (min(low, 0.0), max(high, 0.0)) if end)

    def start(self, low: float, high: float, spec: QuantSpec) -> Point:
        return (0.0,) * len(self.box(low, high, spec))

    def spread(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        factors = iter(point * 2 if spec.symmetric else point)
        ends = [end * 2.0 ** next(factors) if end else 0.0 for end in (min(low, 0.0), max(high, 0.0))]
        return from_range(np.asarray(ends[0]), np.asarray(ends[1]), spec)
