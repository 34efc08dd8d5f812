"""What runs at several sizes show of a graph: values of tensors, shapes of others, and which of their sizes go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from vitq_compiler.graph import Array, Graph, Tensor, is_constant
from vitq_compiler.runtime import probe
from vitq_compiler.sizes import Probe, open_axes

Series = tuple[int, ...]  # a size in each of the runs


@dataclass(frozen=True)
class Observed:
    """Runs of a graph on probes.

    Attributes:
        probes: what it was run on.
        values: tensor name -> its value in each run.
        shapes: tensor name -> its shape in each run.
    """

    probes: Sequence[Probe]
    values: dict[str, list[Array]]
    shapes: dict[str, list[tuple[int, ...]]]

    @property
    def sizes(self) -> int:
        """How many sizes were tried; batches do not count."""
        return len({str(sorted(p.shapes.items())) for p in self.probes})

    @property
    def certain(self) -> bool:
        """Whether what did not change can be held for a constant: only one size is taken, or several were tried."""
        return self.sizes != 2

    def series(self, name: str, axis: int) -> Series | None:
        """A size of a tensor in each run; None where it was not observed, or differs in rank from run to run."""
        shapes = self.shapes.get(name, [])
        return tuple(shape[axis] for shape in shapes) if shapes and all(axis < len(shape) for shape in shapes) else None

    @property
    def batches(self) -> Series:
        """How many samples there were in each run."""
        return tuple(p.batch for p in self.probes)


def observe(graph: Graph, probes: Sequence[Probe], values: Iterable[Tensor], shapes: Iterable[Tensor], threads: int) -> Observed:
    """Run ``graph`` on every probe.

    Raises:
        TargetError: it does not run.
    """
    values, shapes = list(values), list({id(t): t for t in shapes}.values())
    if not values and not shapes:
        return Observed(probes, {}, {})
    copy = graph.snapshot()
    seen = {t.name: copy.insert("Shape", [copy.tensor(t.name)], name=f"{t.name}/observed").name for t in shapes}
    feeds = [p.feed(graph.inputs) for p in probes]
    runs = probe(copy, [*(t.name for t in values), *seen.values()], feeds, threads=threads)
    return Observed(
        probes,
        {t.name: [run[t.name] for run in runs] for t in values},
        {name: [tuple(int(d) for d in np.atleast_1d(run[shape])) for run in runs] for name, shape in seen.items()},
    )


@dataclass(frozen=True)
class Symbols:
    """Names for sizes that differ from run to run: of the open axes of inputs, and of what is made of them.

    Attributes:
        axes: series of sizes -> the input axis that has it.
    """

    graph: Graph
    observed: Observed

    @cached_property
    def axes(self) -> dict[Series, tuple[str, int]]:
        """Series of sizes -> an input axis that has it, that of the batch first."""
        found: dict[Series, tuple[str, int]] = {}
        batch = next(((spec.name, 0) for spec in self.graph.inputs if spec.batched and not spec.fixed_batch), None)
        if batch is not None:
            found[self.observed.batches] = batch
        for name, axis in (group[0] for group in open_axes(self.graph.inputs)):
            found.setdefault(tuple(p.shapes[name][axis] for p in self.observed.probes), (name, axis))
        return found

    @cached_property
    def names(self) -> dict[Series, str]:
        """Those of the input axes that have names."""
        declared = {(spec.name, axis): size for spec in self.graph.inputs for axis, size in enumerate(spec.shape)}
        return {series: str(declared[axis]) for series, axis in self.axes.items() if isinstance(declared[axis], str) and declared[axis]}


def name_sizes(graph: Graph, observed: Observed) -> None:
    """Write into the shapes of tensors what was observed: numbers, and the same name wherever a size is the same in every run.

    Inputs and outputs keep the sizes and names that the model declares; what these are called, others are called too.
    """
    names = dict(Symbols(graph, observed).names)
    for tensor in graph.outputs:
        for axis, size in enumerate(tensor.shape or ()):
            series = observed.series(tensor.name, axis)
            if isinstance(size, str) and size and series is not None and size not in names.values():
                names.setdefault(series, size)
    taken = set(names.values())
    for tensor in graph.tensors():
        shapes = observed.shapes.get(tensor.name)
        if shapes is None or is_constant(tensor) or graph.is_input(tensor) or len({len(shape) for shape in shapes}) != 1:
            continue
        sizes: list[int | str] = []
        for series in zip(*shapes, strict=True):
            if len(set(series)) == 1 and observed.certain:
                sizes.append(series[0])
                continue
            if series not in names:
                names[series] = next(name for n in count() if (name := f"size_{n}") not in taken)
                taken.add(names[series])
            sizes.append(names[series])
        declared = (tensor.shape or []) if graph.is_output(tensor) else []
        tensor.shape = [old or new for old, new in zip(declared, sizes, strict=True)] if declared else sizes
