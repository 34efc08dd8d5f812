"""Every channel of the values around zero, and with them the input of the projection.

    P (v + 1 s') W + c  =  P v W + s' W + c,   s = -(low + high) / 2 for every channel of v

The rows of P sum to one, so what is added to all values is added to the product; the projection's bias takes it out again.
With quantized probabilities the rows sum to one only nearly, and the identity holds as nearly.

Precondition: v is read by this attention alone, as values alone. Of queries and keys nothing is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Values, shift_features
from vitq_compiler.blocks.linear import absorb
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.passes._heads import ObservedHeads, values
from vitq_compiler.pipeline import Compilation


@dataclass(frozen=True)
class CenterValues(ObservedHeads[Values]):
    """P v W + c -> P (v - center) W + (c + center W)"""

    name = "center-values"
    letters = "v"
    does = "values are not centred"

    def blocks(self, c: Compilation) -> list[Values]:
        return values(self, c, self.does)

    def rewrite(self, c: Compilation, attention: Values, seen: dict[str, ChannelStatistics]) -> None:
        """Out of the bias of the value Linear, into that of the projection."""
        ranges = seen[attention.v.linear.output.name]
        shift = -np.add(ranges.low, ranges.high, dtype=np.float64)[attention.v.columns] / 2
        shift_features(c.graph, attention.v, shift)
        absorb(c.graph, attention.proj, shift, np.ones_like(shift))
