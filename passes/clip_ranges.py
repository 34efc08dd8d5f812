"""Calibrated ranges, narrowed to what a share of the values or the least squared error of the tensor calls for.

    [min, max] -> [quantile(1 - p), quantile(p)],  p of .999, .9999, .99999 with the least squared error      by=percentile
    [min, max] -> the two ends with the least squared error, searched apart                                   by=mse

``percentile`` is the observer of RepQ-ViT's code (arXiv 2212.08254). With ``channels`` every channel of a LayerNormalization
output gets a range of its own, for reparameterize-layernorm to move into the affine: by percentile, and with ``learned`` from there
on by the error of what the Linear layers that read it give out (see `clipping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitq_compiler.clipping import learn_clipping
from vitq_compiler.graph import is_constant, producer, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import QuantSpec, fake_quantize, from_range
from vitq_compiler.quantizer import quantizer_for
from vitq_compiler.sampling import Samples, sample_rows
from vitq_compiler.search import search

LEVELS = (0.999, 0.9999, 0.99999)


@dataclass(frozen=True)
class ClipRanges(Pass):
    """CalibrationTable -> CalibrationTable with narrower ranges"""

    name = "clip-ranges"
    requires = frozenset({Fact.CALIBRATED})
    edits = False
    by: str = "percentile"
    channels: bool = False
    learned: bool = False
    rows: int = 1024

    def __post_init__(self) -> None:
        if self.by not in ("percentile", "mse"):
            raise ValueError(f"by must be percentile or mse, got {self.by}")
        if self.rows < 1:
            raise ValueError("rows must be at least 1")
        if self.learned and not self.channels:
            raise ValueError("learned must be given with channels: it learns a range for each")

    def run(self, c: Compilation) -> int:
        nodes = {node.name: node for node in c.graph.nodes}
        specs = {}
        for edge, spec in c.specs.items():
            tensor = nodes[edge.node].inputs[edge.index]
            if not is_constant(tensor) and nodes[edge.node].op != "Conv":
                specs[tensor.name] = spec
        data, clipped = c.data, 0
        samples = sample_rows(
            c.graph, list(specs), data.calibration(), data.calibration_count, rows=self.rows, threads=c.threads, progress=c.progress
        )
        for done, (name, spec) in enumerate(specs.items()):
            c.progress("clipping", done, len(specs))
            source = producer(c.graph.tensor(name))
            apart = self.channels and source is not None and source.op == "LayerNormalization"
            seen = c.table.statistics[name]
            low, high = self._by_channel(c, name, samples[name], spec) if apart else self._by_tensor(samples[name], spec)
            c.table.statistics[name] = replace(seen, low=np.maximum(seen.low, low), high=np.minimum(seen.high, high))
            clipped += 1
        return clipped

    def _by_channel(self, c: Compilation, name: str, x: Samples, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
        low, high = by_channel(x, spec)
        weights = [value(linear.weight) for linear in c.annotations.linears if linear.input.name == name]
        if not self.learned or not weights:
            return low, high
        gram = np.sum([weight @ weight.T for weight in weights], axis=0)
        return learn_clipping(x, gram, (low, high), spec.bits)

    def _by_tensor(self, x: Samples, spec: QuantSpec) -> tuple[np.float32, np.float32]:
        x = x.reshape(-1)
        low, high = float(x.min()), float(x.max())
        quantizer = quantizer_for(spec)
        if self.by == "mse" and spec.quantizer == "affine":
            box, start = quantizer.box(low, high, spec), quantizer.start(low, high, spec)
            best = search(lambda p: float(np.square(fake_quantize(x, quantizer.place(p, low, high, spec)) - x).sum()), box, start)
            params = quantizer.place(best, low, high, spec)
            ends = [params.scale * (code - params.zero_point) for code in (params.quant_min, params.quant_max)]
            return np.float32(ends[0]), np.float32(ends[1])
        ranges = [(float(a), float(b)) for a, b in zip(np.quantile(x, [1 - p for p in LEVELS]), np.quantile(x, LEVELS), strict=True)]
        errors = [np.square(fake_quantize(x, quantizer.from_range(a, b, spec)) - x).sum() for a, b in ranges]
        a, b = ranges[int(np.argmin(errors))]
        return np.float32(a), np.float32(b)


def by_channel(x: Samples, spec: QuantSpec, levels: Sequence[float] = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """The best percentile range of each channel of x [rows, channels]; ``spec`` gives the bits."""
    lows, highs, errors = [], [], []
    for level in levels:
        low, high = np.quantile(x, [1 - level, level], axis=0)
        params = from_range(low, high, spec, axis=1)
        lows.append(low)
        highs.append(high)
        errors.append(np.square(fake_quantize(x, params) - x).sum(0))
    best = np.argmin(errors, axis=0)[None]
    low, high = (np.take_along_axis(np.stack(ends), best, 0)[0].astype(np.float32) for ends in (lows, highs))
    return low, high
