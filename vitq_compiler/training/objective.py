"""The error of one batch: of what the blocks of a window hand on, and of what becomes of it at the end of the network.

    metric                                  mse, fisher, hessian or low-rank (`losses`) of the blocks' results alone
    feature   g / g0 + local l / l0         l that of the blocks by mse, g the mean squared error of what the heads read: GLF-Q
    output    g / g0 + local l / l0         g the divergence of the heads' answers

g0 and l0 are the values before training. Between a window and the end stands the float rest of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import Array, Graph
from vitq_compiler.pipeline import Compilation
from vitq_compiler.prefix import Inputs, Store
from vitq_compiler.quant import Edge
from vitq_compiler.repair import reference
from vitq_compiler.runtime import run, session
from vitq_compiler.torch_graph import Taps, Tensor, TorchGraph, require_torch
from vitq_compiler.training.learned import Learned
from vitq_compiler.training.losses import METRICS, divergence, error, weigh
from vitq_compiler.training.windows import Window

LOSSES = ("feature", "output", *METRICS)
FLOOR = 1e-12


@dataclass(frozen=True)
class Goal:
    """What to train for.

    Attributes:
        loss: of `LOSSES`.
        local: weight of the blocks' error, for a loss that has another.
        prefix: ``quantized`` or ``float``: what the windows before give to this one.
    """

    loss: str
    local: float
    prefix: str

    @property
    def metric(self) -> str:
        """How the results of blocks are compared."""
        return self.loss if self.loss in METRICS else "mse"

    def finals(self, c: Compilation) -> tuple[str, ...]:
        """The tensors at the end of the network that count."""
        if self.loss == "feature":
            return features(c)
        return _answers(c, self.loss) if self.loss == "output" else ()


def features(c: Compilation) -> tuple[str, ...]:
    """What heads and other last layers read; where there is none, the outputs of the graph."""
    ends = dict.fromkeys(linear.input.name for linear in c.annotations.linears if linear.role in ("head", "output"))
    return tuple(ends) or tuple(t.name for t in c.graph.outputs if t.dtype is None or np.dtype(t.dtype).kind == "f")


def _answers(c: Compilation, loss: str) -> tuple[str, ...]:
    """What the heads give out."""
    heads = dict.fromkeys(linear.output.name for linear in c.annotations.linears if linear.role == "head")
    if not heads:
        raise RecipeError(f"loss={loss} compares the answers of a head, and the model has none: take loss=feature or loss=mse")
    return tuple(heads)


class Objective:
    """The loss of one batch, as a function of its number and of the quantizers.

    Args:
        c: the compilation.
        window: what is trained.
        inputs: what it reads.
        stores: where the float values of the final tensors are, and where weights of errors are put.
        learned: the quantizers as they are before training.
        goal: what to train for.
    """

    def __init__(self, c: Compilation, window: Window, inputs: Inputs, stores: tuple[Store, Store], learned: Learned, goal: Goal) -> None:
        self._torch, self._inputs, self._goal, self._device = require_torch("training"), inputs, goal, learned.device
        self._window, self._finals, self.count = window, goal.finals(c), inputs.count
        self._final, self._weights = stores
        stage, last = window.stage, () if window.rest else self._finals
        self._names = tuple(dict.fromkeys((*window.ends, *stage.results, *last)))
        self._part = TorchGraph(c.graph.part(stage.sources, self._names), self._device)
        self._suffix = TorchGraph(reference(c).part(window.rest, self._finals), self._device) if window.rest and self._finals else None
        self._ends = _Ends(reference(c), stage.sources, window.ends, inputs, c.threads)
        self._energy = self._variances(window.ends, self._ends.get) | self._variances(self._finals, self._final.get)
        if goal.metric != "mse":
            self._weigh(c)
        with self._torch.no_grad():
            self._before = [max(float(x), FLOOR) for x in self._errors(0, learned.taps())]

    def __call__(self, batch: int, taps: Taps) -> Tensor:
        blocks, final = self._errors(batch, taps)
        if not self._finals:
            return blocks / self._before[0]
        return final / self._before[1] + self._goal.local * blocks / self._before[0]

    def _errors(self, batch: int, taps: Taps) -> tuple[Tensor, Tensor]:
        """Of what the blocks hand on, and of the final tensors."""
        outputs = self._part({n: self._read(n, batch) for n in self._window.stage.sources}, taps)
        found = dict(zip(self._names, outputs.values(), strict=True))  # a part may call what it passes on by another name
        blocks = [self._block_error(name, found[name], batch) for name in self._window.ends]
        return sum(blocks) / max(len(blocks), 1), self._final_error(found, batch) if self._finals else self._torch.zeros(())

    def _block_error(self, name: str, found: Tensor, batch: int) -> Tensor:
        metric = self._goal.metric
        weights = self._energy[name] if metric == "mse" else self._tensor(self._weights.get(name, batch))
        return error(metric, found - self._tensor(self._ends.get(name, batch)), weights)

    def _final_error(self, found: dict[str, Tensor], batch: int) -> Tensor:
        if self._suffix is not None:
            feed = {n: found[n] if n in found else self._read(n, batch) for n in self._window.rest}
            found = dict(zip(self._finals, self._suffix(feed).values(), strict=True))
        wanted = {n: self._tensor(self._final.get(n, batch)) for n in self._finals}
        if self._goal.loss == "output":
            return divergence([found[n] for n in self._finals], list(wanted.values()))
        return sum(error("mse", found[n] - wanted[n], self._energy[n]) for n in self._finals) / len(self._finals)

    def _weigh(self, c: Compilation) -> None:
        """Put what the metric needs to know of every result into its store, batch by batch."""
        sources = tuple(
            dict.fromkeys((*self._window.stage.sources, *(n for n in self._window.rest if n not in self._window.stage.results)))
        )
        suffix = _Suffix(reference(c).part(sources, _answers(c, self._goal.loss)), self._window.ends, self._device)
        for batch in range(self.count):
            suffix.feed = {n: self._tensor(self._inputs.batch(n, batch)[0]) for n in sources}
            results = [self._tensor(self._ends.get(n, batch)) for n in self._window.ends]
            for name, weights in zip(self._window.ends, weigh(self._goal.metric, suffix, results, batch), strict=True):
                self._weights.put(name, batch, weights.cpu().numpy())

    def _variances(self, names: Sequence[str], get: Callable[[str, int], Array]) -> dict[str, float]:
        found = np.mean([[get(name, batch).var() for name in names] for batch in range(self.count)], axis=0)
        return {name: max(float(variance), FLOOR) for name, variance in zip(names, found, strict=True)}

    def _read(self, name: str, batch: int) -> Tensor:
        return self._tensor(self._inputs.batch(name, batch)[self._goal.prefix == "quantized"])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self._torch.from_numpy(np.array(array)).to(self._device)


class _Ends:
    """The float values of a window's ends, computed batch by batch when they are asked for: those of all would fill a memory."""

    def __init__(self, graph: Graph, sources: tuple[str, ...], names: tuple[str, ...], inputs: Inputs, threads: int) -> None:
        self._sources, self._names, self._inputs = sources, names, inputs
        self._runtime = session(graph.part(sources, names), threads=threads, takes_turns=True) if names else None
        self._batch, self._values = -1, dict[str, Array]()

    def get(self, name: str, batch: int) -> Array:
        if batch != self._batch and self._runtime is not None:
            feed = {source: np.asarray(self._inputs.batch(source, batch)[0]) for source in self._sources}
            self._batch, self._values = batch, dict(zip(self._names, run(self._runtime, feed), strict=True))
        return self._values[name]


class _Suffix:
    """The float network as a function of what is added to some of its tensors; see `losses.Suffix`."""

    def __init__(self, graph: Graph, names: Sequence[str], device: str) -> None:
        readers = {(n.name, i): t.name for n in graph.nodes for i, t in enumerate(n.inputs) if t.name in names}
        self._edges = {Edge(*edge): names.index(name) for edge, name in readers.items()}
        self._direct = [names.index(name) if name in names else None for name in graph.output_names]
        self._function = TorchGraph(graph, device)
        self.feed: dict[str, Tensor] = {}

    def __call__(self, nudges: Sequence[Tensor]) -> list[Tensor]:
        taps = {edge: lambda x, nudge=nudges[number]: x + nudge for edge, number in self._edges.items()}
        outputs = self._function(self.feed, taps).values()
        return [x if number is None else x + nudges[number] for x, number in zip(outputs, self._direct, strict=True)]


def store_outputs(
    graph: Graph, sources: tuple[str, ...], names: tuple[str, ...], batches: Iterable[Iterable[np.ndarray]], store: Store, threads: int
) -> int:
    """Compute the tensors ``names`` from ``sources``, batch by batch, and store them; returns the number of batches."""
    runtime = session(graph.part(sources, names), threads=threads) if names else None
    number = -1
    for number, arrays in enumerate(batches):
        if runtime is not None:
            for name, array in zip(names, run(runtime, dict(zip(sources, map(np.asarray, arrays), strict=True))), strict=True):
                store.put(name, number, array)
    return number + 1
