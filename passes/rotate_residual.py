"""The residual stream in another basis, in which no channel stands out.

    u -> u R,   W_writer -> W_writer R,   W_reader -> R' W_reader,   R orthogonal with R 1 = 1

Because R keeps the mean and the length of a vector, n(u R) = n(u) R for the normalization n of LayerNormalization, whose node
stays as it is: no time is added anywhere, and RMSNormalization asks for less. (Rotations as in QuaRot, arXiv 2404.00456, turn
LayerNorm into RMSNorm to get there; the condition R 1 = 1 makes that needless, and lets them pass patch merging, where I (x) R
keeps ones too.) R is a Hadamard matrix with random signs, reflected so that it keeps ones. Writers are patch embedding, class
token, position embeddings, proj, fc2; readers are what follows the LayerNormalizations.

Scale and shift of the normalizations go into their readers first, as fold-layernorm-affine does it everywhere.

Precondition: nothing else reads or writes the stream, and nothing but Linear layers its normalizations; run fold-layer-scale before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.residual import Stream, find_streams, fold_affine, only_normalizes, readers_of_norm
from vitq_compiler.graph import value
from vitq_compiler.orthogonal import apply_along, keeping_ones, random_orthogonal
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class RotateResidual(Pass):
    """u -> u R: W_writer R, R' W_reader"""

    name = "rotate-residual"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True
    seed: int = 0

    def run(self, c: Compilation) -> int:
        changes = 0
        for index, stream in enumerate(find_streams(c.graph, c.annotations.linears)):
            try:
                if stream.refusal:
                    raise MatchFailure(stream.refusal)
                _fold_affines(c, stream)
            except MatchFailure as failure:
                self.note(c, stream.norms[0].name, f"the residual stream of width {stream.width} is not rotated: {failure.reason}")
                continue
            random = np.random.default_rng((self.seed, index))
            rotation = keeping_ones(random_orthogonal(stream.width, random))
            for port in (*stream.writers, *stream.readers):
                port.tensor.values = apply_along(value(port.tensor), port.axis, rotation)
            changes += 1
        return changes


def _fold_affines(c: Compilation, stream: Stream) -> None:
    """Let every normalization of the stream only normalize; refuse before any is touched."""
    left = [norm for norm in stream.norms if not only_normalizes(norm)]
    for norm in left:
        try:
            readers_of_norm(c.graph, norm, c.annotations.linears)
        except MatchFailure as failure:
            raise MatchFailure(f"{norm.op} {norm.name} scales or shifts each channel in its own way, and {failure.reason}") from None
    for norm in left:
        fold_affine(c.graph, norm, c.annotations.linears)
