"""Quantized blocks trained until they compute what the float blocks do.

    codes, scales, biases  ->  those that minimize  g / g0 + local l / l0

l is the mean squared error of what the blocks hand on, in parts of its energy, g that of the final feature (what the head
reads), and g0, l0 their values before training (GLF-Q; the float rest of the network stands between a block and the feature).
Only codes, scales and biases change: the deployed graph stays plain. Blocks are trained in order, ``blocks`` at a time, on inputs
from the quantized blocks before them; 0 trains the whole network at once. An eighth of the samples is held back, and the state
that serves these best is kept. With a work directory an interrupted training goes on where it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vitq_compiler.errors import DataError
from vitq_compiler.graph import Graph, is_constant, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.prefix import Inputs, Stage, Store, merge, stages, walk
from vitq_compiler.quant import Edge
from vitq_compiler.reconstruction import Quantizers, Schedule, current, pick_device, train
from vitq_compiler.repair import quantized_part, reference, repairable
from vitq_compiler.runtime import run, session
from vitq_compiler.torch_graph import Taps, Tensor, TorchGraph, require_torch

HELD_BACK = 8  # one batch of so many is not trained on
FLOOR = 1e-12


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """codes, scales, biases -> those with which the blocks compute what they do in float"""

    name = "reconstruct-blocks"
    requires = frozenset({Fact.QPARAMS})
    steps: int = 3000
    blocks: int = 0
    weight_rate: float = 0.01
    scale_rate: float = 0.001
    local: float = 2.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.blocks < 0 or not min(self.weight_rate, self.scale_rate, self.local) >= 0:
            raise ValueError("steps must be at least 1 and no number negative")

    def run(self, c: Compilation) -> int:
        require_torch(f"pass {self.name}")
        floating = reference(c)
        windows, ends = self._windows(c, stages(c.graph, repairable(c)))
        targets = Store()
        sources = tuple(spec.name for spec in floating.inputs)
        _keep(floating, sources, features(c), ((feed[n] for n in sources) for feed in c.data.calibration()), targets, c.threads)
        walked = walk(floating, windows, c.data.calibration(), lambda s: quantized_part(c, s), threads=c.threads, work_dir=c.work_dir)
        for index, (window, inputs) in enumerate(walked):
            if inputs.count < 2:
                raise DataError(f"pass {self.name} holds samples back: give more of them, or a smaller --batch-size")
            rest = merge(windows, index + 1, len(windows)).sources if index + 1 < len(windows) else ()
            with _blocks(c, window, ends[index], inputs) as outputs, _threads(c.threads):
                objective = _Objective(c, window, rest, ends[index], inputs, (outputs, targets), self.local)
                if not self._train(c, objective, index, len(windows)):
                    where = window.linears[0].block or window.linears[0].name
                    self.note(c, where, "training lowers no error on samples it does not see; codes and scales stay as they were")
        return len(windows)

    def _train(self, c: Compilation, objective: _Objective, index: int, total: int) -> bool:
        """Train one window; whether that served the samples held back."""
        batches, quantizers = range(objective.count), objective.quantizers
        held_back = [b for b in batches if b % HELD_BACK == HELD_BACK - 1] or [batches[-1]]
        before, after = train(
            quantizers,
            objective,
            [b for b in batches if b not in held_back],
            held_back,
            Schedule(self.steps, self.weight_rate, self.scale_rate, seed=index),
            checkpoint=c.work_dir / f"{self.name}-{quantizers.fingerprint(self, index, objective.count)}.pt" if c.work_dir else None,
            advance=lambda done, steps: c.progress("training", index * steps + done, total * steps),
        )
        if after < before:
            _write(c, quantizers)
        return after < before

    def _windows(self, c: Compilation, cut: list[Stage]) -> tuple[list[Stage], list[tuple[str, ...]]]:
        """What is trained together, and the tensors in each whose error counts: what its blocks hand on."""
        firsts = [i for i, stage in enumerate(cut) if any(linear.role == "qkv" for linear in stage.linears)][1:]
        edges = [0, *firsts, len(cut)]
        blocks = [merge(cut, a, b) for a, b in pairwise(edges)]
        width = self.blocks or len(blocks)
        groups = [range(i, min(i + width, len(blocks))) for i in range(0, len(blocks), width)]
        windows = [merge(cut, edges[group[0]], edges[group[-1] + 1]) for group in groups]
        ends = [tuple(dict.fromkeys(name for i in group for name in blocks[i].results)) for group in groups]
        return windows, ends


def features(c: Compilation) -> tuple[str, ...]:
    """What the heads read; where there is none, the outputs of the graph."""
    heads = dict.fromkeys(linear.input.name for linear in c.annotations.linears if linear.role == "head")
    return tuple(heads) or tuple(t.name for t in c.graph.outputs if t.dtype is None or np.dtype(t.dtype).kind == "f")


class _Objective:
    """The loss of one batch, as a function of its number and of the quantizers."""

    def __init__(
        self,
        c: Compilation,
        window: Stage,
        rest: tuple[str, ...],
        ends: tuple[str, ...],
        inputs: Inputs,
        targets: tuple[Store, Store],
        local: float,
    ) -> None:
        self._torch, self._local, self._inputs = require_torch("reconstruction"), local, inputs
        self._window, self._rest, self._features = window, rest, features(c)
        self.count, self.quantizers = inputs.count, _quantizers(c, window)
        self._names = tuple(dict.fromkeys((*ends, *window.results, *(self._features if not rest else ()))))
        self._part = TorchGraph(c.graph.part(window.sources, self._names), self.quantizers.device)
        self._suffix = TorchGraph(reference(c).part(rest, self._features), self.quantizers.device) if rest else None
        self._wanted = [(name, store) for names, store in zip((ends, self._features), targets, strict=True) for name in names]
        self._split = len(ends)
        self._energy = [max(float(np.mean([store.get(n, b).var() for b in range(self.count)])), FLOOR) for n, store in self._wanted]
        with self._torch.no_grad():
            self._before = [max(float(x), FLOOR) for x in self._errors(0, self.quantizers.taps())]

    def __call__(self, batch: int, taps: Taps) -> Tensor:
        ends, final = self._errors(batch, taps)
        return final / self._before[1] + self._local * ends / self._before[0]

    def _errors(self, batch: int, taps: Taps) -> tuple[Tensor, Tensor]:
        """Mean squared errors in parts of the energy: of what the blocks hand on, of the final feature."""
        outputs = self._part({n: self._read(n, batch) for n in self._window.sources}, taps)
        found = dict(zip(self._names, outputs.values(), strict=True))  # a part may call what it passes on by another name
        last = found
        if self._suffix is not None:
            feed = {n: found[n] if n in found else self._read(n, batch) for n in self._rest}
            last = dict(zip(self._features, self._suffix(feed).values(), strict=True))
        errors = []
        for number, ((name, store), energy) in enumerate(zip(self._wanted, self._energy, strict=True)):
            value = (found if number < self._split else last)[name]
            errors.append((value - self._tensor(store.get(name, batch))).square().mean() / energy)
        ends, final = errors[: self._split], errors[self._split :]
        return sum(ends) / max(len(ends), 1), sum(final) / max(len(final), 1)

    def _read(self, name: str, batch: int) -> Tensor:
        return self._tensor(self._inputs.batch(name, batch)[1])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self._torch.from_numpy(np.array(array)).to(self.quantizers.device)


@contextmanager
def _blocks(c: Compilation, window: Stage, ends: tuple[str, ...], inputs: Inputs) -> Iterator[Store]:
    """What the float blocks of a window hand on."""
    with ExitStack() as stack:
        store = Store(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=c.work_dir))) if c.work_dir else None)
        batches = ((inputs.batch(n, b)[0] for n in window.sources) for b in range(inputs.count))
        _keep(reference(c), window.sources, ends, batches, store, c.threads)
        yield store


def _keep(
    graph: Graph, sources: tuple[str, ...], names: tuple[str, ...], batches: Iterable[Iterable[np.ndarray]], store: Store, threads: int
) -> None:
    """Compute the tensors ``names`` from ``sources``, batch by batch, and store them."""
    runtime = session(graph.part(sources, names), threads=threads) if names else None
    for number, arrays in enumerate(batches):
        if runtime is not None:
            for name, array in zip(names, run(runtime, dict(zip(sources, map(np.asarray, arrays), strict=True))), strict=True):
                store.put(name, number, array)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Let torch compute with as many threads as the runtime may."""
    torch = require_torch("reconstruction")
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _quantizers(c: Compilation, window: Stage) -> Quantizers:
    """Quantizers of all edges of a window, as they are now, and the biases of its layers."""
    nodes = {node.name: node for node in c.graph.part(window.sources, window.results).nodes}
    activations, weights, biases = {}, {}, {}
    for edge, params in c.params.items():
        if edge.node in nodes:
            tensor = nodes[edge.node].inputs[edge.index]
            if is_constant(tensor):
                weights[edge] = current(value(tensor), params, c.rounding.get(edge))
            else:
                activations[edge] = (f"{tensor.name} {params}", params)
    for linear in window.linears:
        unit = weights[Edge(linear.name, 1)].params.scale
        if (edge := Edge(linear.name, 0)) in activations:  # what one code of the weight is worth at half of the input's range
            params = activations[edge][1]
            unit = unit * params.scale * np.float32((params.quant_max - params.quant_min) / 2)
        assert linear.add is not None  # `reference` gave every layer a bias
        bias = value(linear.add.inputs[1])
        biases[Edge(linear.add.name, 1)] = bias, np.broadcast_to(unit, bias.shape)
    return Quantizers(activations, weights, biases, pick_device(c.device))


def _write(c: Compilation, quantizers: Quantizers) -> None:
    """Let the compilation have what was trained."""
    for edge in quantizers.activations:
        c.params[edge] = quantizers.activation_params(edge)
    for edge in quantizers.weights:
        c.rounding[edge], c.params[edge] = quantizers.weight_codes(edge)
    for edge in quantizers.biases:
        c.graph.node(edge.node).inputs[1].values = quantizers.bias(edge)
