"""Channel ranges of queries and keys made alike.

    (q diag(a)) (k diag(1/a))' = q k',   a = (range of k / range of q)^(strength / 2)

At full strength a channel of q and its partner in k have the same range, so that one scale for each tensor serves both well.
``per-head`` gives all channels of a head one factor (per-head scales as AdaLog's and APHQ-ViT's, made static).

Precondition: q and k are read by this attention alone and share no features. The same for v and proj is equalize-values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.attention import Attention, HeadView, scale_features
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.passes._heads import ObservedHeads, queries_and_keys
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import check_strength, equalizing_scale


@dataclass(frozen=True)
class EqualizeHeads(ObservedHeads[Attention]):
    """q k' -> (q diag(a)) (k diag(1/a))'"""

    name = "equalize-heads"
    letters = "qk"
    does = "queries and keys keep their ranges"
    strength: float = 1.0
    per_head: bool = False

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def blocks(self, c: Compilation) -> list[Attention]:
        return queries_and_keys(self, c, self.does)

    def rewrite(self, c: Compilation, attention: Attention, seen: dict[str, ChannelStatistics]) -> None:
        """Into the Linear layers of q and k."""
        queries, keys = (self._reach(view, attention.heads, seen) for view in (attention.q, attention.k))
        factor = (keys / queries) ** (self.strength / 2)
        scale_features(attention.q, factor)
        scale_features(attention.k, 1 / factor)

    def _reach(self, view: HeadView, heads: int, seen: dict[str, ChannelStatistics]) -> NDArray[np.float64]:
        statistics = seen[view.linear.output.name]
        reach = np.maximum(np.abs(statistics.low), np.abs(statistics.high))[view.columns]
        if self.per_head:
            reach = np.repeat(reach.reshape(heads, -1).max(1), len(reach) // heads)
        live, _ = equalizing_scale(reach, 1.0)
        return live
