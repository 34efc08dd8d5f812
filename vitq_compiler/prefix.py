"""A walk through a network, float and quantized side by side, from one group of Linear layers to the next.

Nodes are cut into stages by the number of Linear layers on the longest way to them: stage 0 comes before the first, every
other one begins with the layers of its depth (q, k and v are one group). `walk` stops before each stage, shows the inputs of
its layers as the float graph and as the quantized graph so far computes them, and lets the caller change these layers before
it goes on: later layers see what earlier ones have become. Each stage is run once for each graph, so a walk costs two forward
passes however deep the network. Only tensors that a later stage reads are kept, batch by batch, in memory or in files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Array, Graph, is_constant, producer
from vitq_compiler.runtime import Feed, run, sample_count, session


@dataclass(frozen=True)
class Stage:
    """Part of a graph between two cuts.

    Attributes:
        sources: tensors it takes.
        results: tensors that a later stage reads, or outputs of the graph.
        linears: the layers it begins with.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    linears: tuple[Linear, ...]


def stages(graph: Graph, linears: Iterable[Linear]) -> list[Stage]:
    """Cut ``graph`` before each group of ``linears``; a stage for each depth, also for those without any of its nodes."""
    by_matmul = {id(linear.matmul): linear for linear in linears}
    depth: dict[int, int] = {}  # of tensors, by id
    made_at: dict[str, int] = {spec.name: 0 for spec in graph.inputs}
    read_at: dict[str, set[int]] = {}
    groups: dict[int, list[Linear]] = {0: []}
    for node in graph.clean().nodes:
        place = max((depth.get(id(t), 0) for t in node.inputs), default=0)
        if id(node) in by_matmul:
            place += 1
            groups.setdefault(place, []).append(by_matmul[id(node)])
        for tensor in node.inputs:
            if not is_constant(tensor) and tensor.name and (producer(tensor) is not None or graph.is_input(tensor)):
                read_at.setdefault(tensor.name, set()).add(place)
        for tensor in node.outputs:
            depth[id(tensor)] = place
            made_at[tensor.name] = place
    end = max(groups) + 1
    for name in graph.output_names:
        read_at.setdefault(name, set()).add(end)
    found = []
    for place in range(end):
        sources = [n for n, made in made_at.items() if place in read_at.get(n, ()) and (made < place or n in _inputs(graph))]
        results = [n for n, made in made_at.items() if made == place and n not in _inputs(graph) and max(read_at.get(n, {-1})) > place]
        found.append(Stage(tuple(sources), tuple(results), tuple(groups.get(place, ()))))
    return found


def merge(cut: list[Stage], first: int, stop: int) -> Stage:
    """Stages ``first`` to ``stop`` - 1 of ``cut`` as one."""
    inside = cut[first:stop]
    made = {name for stage in inside for name in stage.results}
    read = {name for stage in cut[stop:] for name in stage.sources}
    ends = {name for name in made if not any(name in stage.sources for stage in cut)}  # outputs of the graph that nothing reads
    sources = dict.fromkeys(name for stage in inside for name in stage.sources if name not in made)
    results = dict.fromkeys(name for stage in inside for name in stage.results if name in read | ends)
    return Stage(tuple(sources), tuple(results), tuple(linear for stage in inside for linear in stage.linears))


def _inputs(graph: Graph) -> set[str]:
    return {spec.name for spec in graph.inputs}


@dataclass
class Store:
    """Tensors by name and batch: in memory, or as files of ``folder`` that are mapped when they are read."""

    folder: Path | None = None
    _held: dict[tuple[str, int], Array] = field(default_factory=dict)
    _files: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, batch: int, array: Array) -> None:
        """Keep one batch of a tensor."""
        if self.folder is None:
            self._held[name, batch] = array
        else:
            np.save(self._path(name, batch), array)

    def get(self, name: str, batch: int) -> Array:
        """One batch of a tensor; KeyError where it is not kept."""
        if self.folder is None:
            return self._held[name, batch]
        path = self._path(name, batch)
        if not path.is_file():
            raise KeyError(name)
        found: Array = np.load(path, mmap_mode="r")
        return found

    def drop(self, name: str, batches: int) -> None:
        """Forget a tensor."""
        for batch in range(batches):
            if self.folder is None:
                self._held.pop((name, batch), None)
            else:
                self._path(name, batch).unlink(missing_ok=True)

    def _path(self, name: str, batch: int) -> Path:
        assert self.folder is not None
        number = self._files.setdefault(name, len(self._files))  # tensor names make no file names
        return self.folder / f"{number}_{batch}.npy"


@dataclass(frozen=True)
class Inputs:
    """What a stage is about to read, in the float graph and in the quantized one, batch by batch; ``samples`` is how many each holds."""

    floating: Store
    quantized: Store
    samples: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self.samples)

    def batch(self, name: str, number: int) -> tuple[Array, Array]:
        """One batch of a tensor of the stage's sources: (float, quantized)."""
        return self.floating.get(name, number), self.quantized.get(name, number)

    def pairs(self, name: str) -> Iterator[tuple[Array, Array]]:
        """All batches of a tensor."""
        return (self.batch(name, number) for number in range(self.count))

    def parts(self, name: str, size: int) -> Iterator[tuple[Array, Array]]:
        """All samples of a tensor, ``size`` at a time whatever the batches; whole batches where the first axis does not count samples."""
        waiting: list[tuple[Array, Array]] = []
        for (x, other), count in zip(self.pairs(name), self.samples, strict=True):
            if len(x) % count or (count == size and not waiting):
                yield x, other
                continue
            for one in zip(np.split(x, count), np.split(other, count), strict=True):
                waiting.append(one)
                if len(waiting) == size:
                    yield _joined(waiting)
                    waiting = []
        if waiting:
            yield _joined(waiting)


def _joined(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The rows of some samples, [rows, channels]; their numbers of tokens may differ."""
    x, other = (np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in zip(*pairs, strict=True))
    return x, other


def walk(
    floating: Graph,
    cut: list[Stage],
    batches: Iterable[Feed],
    quantized: Callable[[Stage], Graph],
    *,
    threads: int = 0,
    work_dir: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Stage, Inputs]]:
    """Go through the stages of ``cut``.

    Args:
        floating: the float graph.
        cut: its stages; the quantized graph has the same tensors.
        batches: inputs of the network.
        quantized: gives the quantized form of a stage (a graph from its sources to its results) when it is about to be run.
        threads: as in `runtime.session`.
        work_dir: where to keep activations instead of in memory; everything put there is removed again.
        advance: told after every stage.

    Yields:
        Each stage that has Linear layers, and its inputs. Layers must be changed before the next is asked for.
    """
    with ExitStack() as stack:
        stores = []
        for _ in range(2):
            folder = None
            if work_dir is not None:
                work_dir.mkdir(parents=True, exist_ok=True)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work_dir)))
            stores.append(Store(folder))
        samples: list[int] = []
        for feed in batches:
            for name, array in feed.items():
                for store in stores:
                    store.put(name, len(samples), array)
            samples.append(sample_count(floating.inputs, feed))
        count = len(samples)
        for index, stage in enumerate(cut):
            if stage.linears:
                yield stage, Inputs(stores[0], stores[1], tuple(samples))
            for store, graph in zip(stores, (floating.part(stage.sources, stage.results), quantized(stage)), strict=True):
                if stage.results and index + 1 < len(cut):
                    runtime = session(graph, threads=threads)
                    for batch in range(count):
                        values = run(runtime, {spec.name: np.asarray(store.get(spec.name, batch)) for spec in graph.inputs})
                        for name, array in zip(stage.results, values, strict=True):
                            store.put(name, batch, array)
                for name in set(stage.sources) - {n for later in cut[index + 1 :] for n in later.sources}:
                    store.drop(name, count)
            advance(index + 1, len(cut))
