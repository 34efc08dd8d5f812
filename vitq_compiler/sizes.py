"""Probes: batches of random numbers on which a graph is run to see which sizes depend on which.

Where only the batch is open, two batches tell all. Where other axes are open too, each takes several sizes, at most those of the
data, so that no probe needs more memory than the model does:

    n, n - 1, n - u, n - 2u, n - 4u, ...      u the pixels from patch to patch along the axis, 1 for tokens

Whatever rounds a size to whole patches or windows, on whichever stage of a pyramid, gives itself away between two of these. Axes
of the same name have the same size; others change in another order, so that no two of them are taken for one. What a graph does
not take is left out: one that takes no other size at all, for its positions are a table, is seen at that size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Array, InputSpec
from vitq_compiler.runtime import Feed

Shapes = Mapping[str, tuple[int, ...]]  # input -> its shape; 0 for an open batch
Axis = tuple[str, int]  # input, and which of its axes
Sizes = Mapping[Axis, int]
BATCHES = (2, 3)
STEPS = (1, 2, 4, 8, 16)  # in patches
SHIFT = 2  # how many places later an axis takes a size than the one before it


@dataclass(frozen=True)
class Probe:
    """So many samples, of these shapes."""

    batch: int
    shapes: Shapes

    def feed(self, inputs: Iterable[InputSpec], seed: int = 0) -> Feed:
        """Seeded random numbers of the right types; integers are 0 or 1."""
        random = np.random.default_rng(seed)
        feed: Feed = {}
        for spec in inputs:
            shape = [size or self.batch for size in self.shapes[spec.name]]
            values = random.standard_normal(shape) if spec.dtype.kind == "f" else random.integers(0, 2, shape)
            feed[spec.name] = np.asarray(values).astype(spec.dtype)
        return feed


def is_open(size: int | str | None) -> bool:
    """Whether a size of an `InputSpec` is left open."""
    return not (isinstance(size, int) and size > 0)


def has_batch(spec: InputSpec, axis: int) -> bool:
    """Whether an axis of an input counts samples."""
    return axis == 0 and spec.batched


def open_axes(inputs: Iterable[InputSpec]) -> list[list[Axis]]:
    """The open axes besides the batch; those of one name, which have to be equal, together."""
    groups: dict[str | Axis, list[Axis]] = {}
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if is_open(size) and not has_batch(spec, axis):
                name = size if isinstance(size, str) and size else (spec.name, axis)
                groups.setdefault(name, []).append((spec.name, axis))
    return list(groups.values())


def shapes_of(inputs: Iterable[InputSpec], feed: Feed) -> Shapes:
    """The shapes of a batch."""
    return {
        spec.name: tuple(
            0 if is_open(spec.shape[axis]) and has_batch(spec, axis) else size for axis, size in enumerate(feed[spec.name].shape)
        )
        for spec in inputs
    }


def probes_of(groups: Sequence[Sequence[Axis]], shapes: Shapes, steps: Sizes, runs: Callable[[Probe], bool], *, alone: bool) -> list[Probe]:
    """Probes for a graph whose data are of ``shapes``; these are the first and, where only the batch is open, the second.

    Args:
        groups: the axes that may take other sizes, those of one group the same.
        shapes: of the data.
        steps: axis -> pixels from patch to patch, where that is known.
        runs: whether the graph takes a probe; asked only where there are ``groups``, or ``alone``.
        alone: whether the data come one by one, which may be because the graph takes no more.
    """
    batches = BATCHES if not alone or runs(Probe(BATCHES[0], shapes)) else (1, 1)
    known = [Probe(batch, shapes) for batch in dict.fromkeys(batches)]

    def taken(choices: Sequence[Sizes]) -> list[Probe]:
        found: list[Probe] = []
        for sizes in filter(None, choices):
            changed = _with(shapes, sizes)
            grown = _volume(changed) / _volume(shapes)
            batch = batches[(len(found) + 1) % 2] if grown <= 1 else 1
            if grown <= BATCHES[0] and runs(probe := Probe(batch, changed)):
                found.append(probe)
        return found

    if not groups:
        return known
    ways = [_ways(group, shapes, steps) for group in groups]
    found, wanted = taken(_combined(ways)), max(map(len, ways))
    if len(found) < wanted - 1:  # some axes take fewer sizes, or none but together with others
        ways = [[sizes for sizes in several if not sizes or taken([sizes])] for several in ways]
        stuck = [axis for group, several in zip(groups, ways, strict=True) for axis in group if len(several) < 2]
        for sign in (-1, 1):
            coupled = [sizes for sizes in _ways(stuck, shapes, steps, sign) if not sizes or taken([sizes])]
            if len(coupled) > 1:
                ways.append(coupled)
                break
        free = [several for several in ways if len(several) > 1]
        found = taken(_combined(free)) or taken([sizes for several in free for sizes in several])
    return [known[0], *found] if found else known


def _volume(shapes: Shapes) -> int:
    return sum(prod(size for size in shape if size) for shape in shapes.values())


def _ways(group: Sequence[Axis], shapes: Shapes, steps: Sizes, sign: int = -1) -> list[Sizes]:
    """Sizes that the axes of a group can take together, smaller or larger than they are; the first, none, leaves them so."""
    changes = [{axis: steps.get(axis, 1) * step for axis in group} for step in STEPS]
    changes = [dict.fromkeys(group, 1), *changes] if sign < 0 else changes  # a pixel more may be cut off again
    ways = [{axis: shapes[axis[0]][axis[1]] + sign * change[axis] for axis in group} for change in changes]
    distinct = {tuple(sizes.items()): sizes for sizes in ways if sizes and min(sizes.values()) > 0}
    return [{}, *distinct.values()]


def _combined(ways: Sequence[Sequence[Sizes]]) -> list[Sizes]:
    """Sizes of all groups at once, as many as the group with most has, each of the others some places later."""
    longest = max(map(len, ways), default=0)
    parts = [[several[(i + SHIFT * j) % len(several)] for j, several in enumerate(ways)] for i in range(longest)]
    return [{axis: size for sizes in together for axis, size in sizes.items()} for together in parts]


def _with(shapes: Shapes, sizes: Sizes) -> Shapes:
    return {name: tuple(sizes.get((name, axis), size) for axis, size in enumerate(shape)) for name, shape in shapes.items()}


def other_sizes(probes: Sequence[Probe], inputs: Sequence[InputSpec], run: Callable[[Feed], list[Array]]) -> list[tuple[Feed, list[Array]]]:
    """The smallest probe of another shape than the first, and what ``run`` gives for it; nothing where that is not finite."""
    others = sorted((probe for probe in probes if probe.shapes != probes[0].shapes), key=lambda probe: _volume(probe.shapes))
    pairs = [(feed, run(feed)) for feed in (probe.feed(inputs) for probe in others[:1])]
    return [(feed, outputs) for feed, outputs in pairs if all(np.isfinite(array).all() for array in outputs)]


def sized(inputs: Iterable[InputSpec], shapes: Shapes) -> list[InputSpec]:
    """The inputs with all sizes but that of an open batch."""
    return [replace(spec, shape=tuple(size or old for size, old in zip(shapes[spec.name], spec.shape, strict=True))) for spec in inputs]


def runs_with(run: Callable[[Feed], object], inputs: Sequence[InputSpec]) -> Callable[[Probe], bool]:
    """Whether ``run`` takes a probe, that is, raises no TargetError."""

    def runs(probe: Probe) -> bool:
        try:
            run(probe.feed(inputs))
        except TargetError:
            return False
        return True

    return runs
