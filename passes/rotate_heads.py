"""Queries, keys and values of every head in another basis, in which no channel stands out.

    (q R) (k R)' = q k',   P (v S) (S' W_proj) = P v W_proj,   R and S orthogonal, one each for every head

Nothing is added at run time: R goes into the Linear layers of q and k, S into those of v and the projection (as R3 and R2 of
SpinQuant, arXiv 2405.16406, without the part that is computed at run time).

Precondition: q, k and v are read by this attention alone and share no features. Rotary embeddings, normalized queries and
cosine attention put operations between a Linear and q k' that no rotation passes; v is rotated there all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.attention import Values, map_heads, map_merged_heads
from vitq_compiler.orthogonal import random_orthogonal
from vitq_compiler.passes._heads import private, queries_and_keys, values
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
        for wanted, letters, find in ((self.keys, "qk", queries_and_keys), (self.values, "v", values)):
            does = f"{' and '.join(letters)} are not rotated"
            for attention in private(self, c, find(self, c, does), letters, does) if wanted else ():
                self._rotate(attention, letters)
                changes += 1
        return changes

    def _rotate(self, attention: Values, letters: str) -> None:
        random = np.random.default_rng((self.seed, attention.index, letters == "v"))
        views = [attention.views[letter] for letter in letters]
        head_dim = len(views[0].columns) // attention.heads
        rotations = np.stack([random_orthogonal(head_dim, random) for _ in range(attention.heads)])
        for view in views:
            map_heads(view, rotations)
        if letters == "v":
            map_merged_heads(attention.proj, rotations)
