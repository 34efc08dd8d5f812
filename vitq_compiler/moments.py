"""What a layer needs to know of its inputs to be repaired: means and second moments, in float and as quantized.

For a layer  y = x W + c  with float input x, and  x' V + c'  with the input x' of the quantized graph,

    E|y - (x' V + c')|^2  =  W^T Cxx W - 2 V^T Cx'x W + V^T Cx'x' V        with c' = c + E[x] W - E[x'] V

where C are covariances: the best bias takes the means out. So neither rounding nor regression needs a single sample again,
and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.rounding import damped

Matrix = NDArray[np.float64]
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
ROWS = 4096  # input vectors that go into one product, at least: sums of large matrices cost as much as products of few rows


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs of one layer, as sums over ``rows`` input vectors; those of two samples add up.

    Attributes:
        rows: number of pairs (x, x').
        sums: sums of x, x', x^T x, x'^T x and x'^T x'.
        halves: the same of every other batch, and of those between; only where asked for, and there are two batches.
    """

    rows: int
    sums: tuple[Matrix, Matrix, Matrix, Matrix, Matrix]
    halves: tuple[Moments, Moments] | None = None

    @classmethod
    def gather(cls, pairs: Iterable[Pair], *, halves: bool = False) -> Moments:
        """Sum over batches of (x, x'), each of shape [samples, ..., inputs]; equal rows belong together."""
        totals: list[Moments] = []
        for place, x, other in _grouped(pairs, 2 if halves else 1):
            part = cls._of(x, other)
            totals[place : place + 1] = [totals[place] + part] if place < len(totals) else [part]
        if not totals:
            raise ValueError("moments of no samples")
        return totals[0] if len(totals) < 2 else replace(totals[0] + totals[1], halves=(totals[0], totals[1]))

    @classmethod
    def _of(cls, x: NDArray[np.float32], other: NDArray[np.float32]) -> Moments:
        squares = ((a.T @ b).astype(np.float64) for a, b in ((x, x), (other, x), (other, other)))
        return cls(len(x), (x.sum(0, np.float64), other.sum(0, np.float64), *squares))

    def __add__(self, more: Moments) -> Moments:
        a, b, c, d, e = (p + q for p, q in zip(self.sums, more.sums, strict=True))
        return Moments(self.rows + more.rows, (a, b, c, d, e))

    @cached_property
    def mean(self) -> Matrix:
        """E[x], [inputs]."""
        return self.sums[0] / self.rows

    @cached_property
    def other_mean(self) -> Matrix:
        """E[x'], [inputs]."""
        return self.sums[1] / self.rows

    @cached_property
    def covariance(self) -> Matrix:
        """Cxx, [inputs, inputs]."""
        return self.sums[2] / self.rows - np.outer(self.mean, self.mean)

    @cached_property
    def cross(self) -> Matrix:
        """Cx'x, [inputs, inputs]; rows belong to x'."""
        return self.sums[3] / self.rows - np.outer(self.other_mean, self.mean)

    @cached_property
    def other_covariance(self) -> Matrix:
        """Cx'x', [inputs, inputs]."""
        return self.sums[4] / self.rows - np.outer(self.other_mean, self.other_mean)

    def error(self, weight: Matrix, other: Matrix) -> Matrix:
        """Mean squared error of x' V for x W in each output under the best bias, [outputs]."""
        kept = np.einsum("io,io->o", weight, self.covariance @ weight)
        shared = np.einsum("io,io->o", other, self.cross @ weight)
        made = np.einsum("io,io->o", other, self.other_covariance @ other)
        left: Matrix = np.maximum(kept - 2 * shared + made, 0.0)
        return left

    def bias_offset(self, weight: Matrix, other: Matrix) -> Matrix:
        """What to add to the bias, so that x' V has the mean of x W in each output, [outputs]."""
        offset: Matrix = self.mean @ weight - self.other_mean @ other
        return offset

    def regress(self, weight: Matrix, strength: float) -> Matrix:
        """V that minimizes E|x W - x' V|^2 + strength |V - W|^2 (ridge regression towards W), [inputs, outputs].

        ``strength`` is relative to the mean energy of an input (the trace of Cx'x' by the number of inputs). What an input that
        never varies is multiplied by does not matter.
        """
        penalty = strength * float(np.trace(self.other_covariance)) / len(weight)
        system = damped(self.other_covariance, strength or 1e-10)
        return np.asarray(np.linalg.solve(system, self.cross @ weight + penalty * weight), np.float64)

    def affine(self, weight: Matrix, other: Matrix, low: float = 0.5, high: float = 2.0) -> Matrix:
        """The factor of each output of x' V that brings it closest to x W, within [low, high], [outputs].

        cov(x' V, x W) / var(x' V), the per-channel form of QwT-v2 (arXiv 2505.20932).
        """
        shared = np.einsum("io,io->o", other, self.cross @ weight)
        made = np.einsum("io,io->o", other, self.other_covariance @ other)
        factor: Matrix = np.divide(shared, made, out=np.ones_like(shared), where=made > 0)
        clamped: Matrix = np.clip(factor, low, high)
        return clamped


def _grouped(pairs: Iterable[Pair], places: int) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """Batches dealt out to so many places in turn, put together to `ROWS` rows: place, x and x', each [rows, inputs]."""
    waiting: list[list[Pair]] = [[] for _ in range(places)]

    def together(place: int) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
        x, other = (np.concatenate(parts) for parts in zip(*waiting[place], strict=True))
        waiting[place] = []
        return place, x, other

    for number, (x, other) in enumerate(pairs):
        place = number % places
        waiting[place].append((x.reshape(-1, x.shape[-1]), other.reshape(-1, x.shape[-1])))
        if sum(len(rows) for rows, _ in waiting[place]) >= ROWS:
            yield together(place)
    yield from (together(place) for place in range(places) if waiting[place])
