"""Queries, keys and values of every head in another basis, in which no channel stands out.

    (q R) (k R)' = q k',   P (v S) (S' W_proj) = P v W_proj,   R and S orthogonal, one each for every head

Nothing is added at run time: R goes into the Linear layers of q and k, S into those of v and the projection (as R3 and R2 of
SpinQuant, arXiv 2405.16406, without the part that is computed at run time).

Precondition: q, k and v are read by this attention alone and share no features. Rotary embeddings, normalized queries and
cosine attention put operations between a Linear and the product that no rotation passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Attention, map_heads, map_merged_heads
from vitq_compiler.orthogonal import random_orthogonal
from vitq_compiler.passes._heads import private_attentions
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class RotateHeads(Pass):
    """(q R) (k R)' and P (v S) (S' W_proj) -> outliers of heads spread"""

    name = "rotate-heads"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True
    seed: int = 0
    keys: bool = True
    values: bool = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for letters in ("qk" if self.keys else "", "v" if self.values else ""):
            for attention in private_attentions(self, c, letters, f"{' and '.join(letters)} are not rotated") if letters else ():
                self._rotate(attention, letters)
                changes += 1
        return changes

    def _rotate(self, attention: Attention, letters: str) -> None:
        random = np.random.default_rng((self.seed, attention.index, letters == "v"))
        views = (attention.v,) if letters == "v" else (attention.q, attention.k)
        head_dim = len(views[0].columns) // attention.heads
        rotations = np.stack([random_orthogonal(head_dim, random) for _ in range(attention.heads)])
        for view in views:
            map_heads(view, rotations)
        if letters == "v":
            map_merged_heads(attention.proj, rotations)
