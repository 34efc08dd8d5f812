"""Codes of weights rounded with feedback among neighbouring inputs, from one run of the float graph.

    round(W) -> V,   row by row within groups of 96 inputs; what a row loses, the rows after it in its group make good

This is GPTQ (arXiv 2210.17323) with the second moments between groups left out, on a sample of the inputs of the float graph, rounded
as they will be. At 8 bits the inputs of the quantized graph are near enough to that, so no walk through both graphs is needed (see
round-weights for that), and groups of all layers of one shape are rounded together: a ViT-S takes less than a second. It more than
pays for what pair limits of weights cost (see `pairs`): scales are fitted to the limit again, now with the energy of each input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, QuantParams, fake_quantize
from vitq_compiler.repair import repairable
from vitq_compiler.rounding import feed_back, feedback_factor
from vitq_compiler.runtime import limited, sample_count
from vitq_compiler.sampling import Samples, sample_rows
from vitq_compiler.weight_scales import widened

GROUP = 96  # inputs between which errors are made good; divides the widths of most models, and larger matrices are factored no better
BYTES = 1 << 23  # of weights rounded together: what a cache holds
TOKENS = 64  # of one image at most: more of the same picture tell little that is new


@dataclass(frozen=True)
class RoundWithFeedback(Pass):
    """round(W) -> V on the same grid, errors made good within groups of inputs"""

    name = "round-with-feedback"
    requires = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    edits = False
    rows: int = 1024
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.damping > 0:
            raise ValueError(f"rows must be at least 1 and damping positive, got {self.rows} and {self.damping}")

    def run(self, c: Compilation) -> int:
        linears = [linear for linear in repairable(c) if c.params[Edge(linear.name, 1)].format == "int"]
        samples = self._sample(c, linears)
        done = 0
        for batch in _alike(c, linears):
            self._round(c, batch, samples)
            done += len(batch)
            c.progress("rounding", done, len(linears))
        return len(linears)

    def _sample(self, c: Compilation, linears: list[Linear]) -> dict[str, Samples]:
        names = list(dict.fromkeys(linear.input.name for linear in linears))
        if not names:
            return {}
        images = min(c.data.calibration_count, max(8, -(-self.rows // TOKENS)))
        kept = list(limited(c.graph.inputs, c.data.calibration(), images))
        found = sum(sample_count(c.graph.inputs, feed) for feed in kept)
        return sample_rows(c.graph, names, kept, found, rows=self.rows, threads=c.threads, progress=c.progress)

    def _round(self, c: Compilation, linears: list[Linear], samples: dict[str, Samples]) -> None:
        """Layers of one shape and one grid."""
        steps, factors = [], []
        moments: dict[tuple[Any, ...], tuple[NDArray[Any], NDArray[Any]]] = {}
        for linear in linears:
            edge, weight = Edge(linear.name, 1), value(linear.weight)
            activation = c.params.get(Edge(linear.name, 0))
            key = linear.input.name, *((activation.scale.tobytes(), activation.zero_point.tobytes()) if activation is not None else ())
            if key not in moments:
                covariance = _covariance(samples[linear.input.name], activation)
                moments[key] = np.diagonal(covariance, axis1=1, axis2=2).reshape(-1), feedback_factor(covariance, self.damping)
            energy, factor = moments[key]
            c.params[edge] = widened(weight, c.params[edge], energy[: len(weight)])
            steps.append(_groups(weight / c.params[edge].scale))
            factors.append(factor)
        params = c.params[Edge(linears[0].name, 1)]
        codes = feed_back(np.concatenate(steps), params, np.concatenate(factors).astype(np.float32))
        for linear, part in zip(linears, np.split(codes, len(linears)), strict=True):
            c.rounding[Edge(linear.name, 1)] = part.reshape(-1, linear.out_features)[: linear.in_features]


def _alike(c: Compilation, linears: list[Linear]) -> Iterator[list[Linear]]:
    """Layers of one shape and one grid, as many as go together."""

    def kind(linear: Linear) -> tuple[Any, ...]:
        params = c.params[Edge(linear.name, 1)]
        grid = params.quant_min, params.quant_max, str(params.pairs), params.zero_point.tobytes()
        return linear.in_features, linear.out_features, *grid

    for _, alike in groupby(sorted(linears, key=kind), kind):
        rest = iter(alike)
        while batch := list(islice(rest, 1)):
            more = BYTES // (4 * batch[0].in_features * batch[0].out_features) - 1
            yield batch + list(islice(rest, max(more, 0)))


def _covariance(x: Samples, params: QuantParams | None) -> NDArray[np.float64]:
    """Covariance within each group of inputs, as the product will see them: [groups, GROUP, GROUP]."""
    x = x if params is None else fake_quantize(x, params)
    x = _groups((x - x.mean(0)).T)
    return np.asarray(x @ x.swapaxes(1, 2) / x.shape[-1], np.float64)


def _groups(rows: NDArray[Any]) -> NDArray[np.float32]:
    """[inputs, n] as [groups, GROUP, n], filled with zeros."""
    padded = np.pad(rows, ((0, -len(rows) % GROUP), (0, 0)))
    return padded.reshape(-1, GROUP, rows.shape[1]).astype(np.float32)
