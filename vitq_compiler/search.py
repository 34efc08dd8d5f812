"""Coarse-to-fine search in a box of few dimensions: a grid, then finer and finer grids around its best points.

The fast progressive combining search of AdaLog (arXiv 2407.12951): its cost is linear in the number of rounds, where a grid
of the same resolution grows with a power of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from vitq_compiler.quantizer import Box, Point


def search(loss: Callable[[Point], float], box: Box, start: Point, *, steps: int = 7, rounds: int = 4, keep: int = 3) -> Point:
    """The best point found; never one worse than ``start``.

    Args:
        loss: what to minimize.
        box: the interval of each coordinate.
        start: tried first.
        steps: points per axis of the first grid.
        rounds: refinements, each of half the spacing of the one before.
        keep: how many points each refinement begins from.
    """
    known: dict[Point, float] = {}

    def visit(point: Point) -> None:
        rounded = tuple(round(float(x), 6) for x in point)
        if rounded not in known:
            known[rounded] = loss(rounded)

    visit(start)
    for point in itertools.product(*(np.linspace(a, b, steps) for a, b in box)):
        visit(point)
    spacing = [(b - a) / (steps - 1) / 2 for a, b in box]
    for _ in range(rounds):
        for center in sorted(known, key=known.__getitem__)[:keep]:
            around = [
                sorted({min(max(x + shift, a), b) for shift in (-s, 0.0, s)}) for x, s, (a, b) in zip(center, spacing, box, strict=True)
            ]
            for point in itertools.product(*around):
                visit(point)
        spacing = [s / 2 for s in spacing]
    return min(known, key=known.__getitem__)
