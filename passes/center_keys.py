"""Every channel of the keys around zero.

    softmax(q (k + 1 s')' ) = softmax(q k'),   s = -(low + high) / 2 for every channel of k

A vector added to all keys adds one number to each row of the scores, which softmax does not see, nor does it with a mask or a
position bias: the bias of the key Linear is free. Symmetric codes then serve the keys as well as asymmetric ones.

Precondition: k is read by this attention alone, as keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, shift_features
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.passes._heads import ObservedHeads, queries_and_keys
from vitq_compiler.pipeline import Compilation


@dataclass(frozen=True)
class CenterKeys(ObservedHeads[Attention]):
    """softmax(q k') -> softmax(q (k - center)')"""

    name = "center-keys"
    letters = "k"
    does = "keys are not centred"

    def blocks(self, c: Compilation) -> list[Attention]:
        return queries_and_keys(self, c, self.does)

    def rewrite(self, c: Compilation, attention: Attention, seen: dict[str, ChannelStatistics]) -> None:
        """Into the bias of the key Linear."""
        keys = seen[attention.k.linear.output.name]
        shift_features(c.graph, attention.k, -np.add(keys.low, keys.high, dtype=np.float64)[attention.k.columns] / 2)
