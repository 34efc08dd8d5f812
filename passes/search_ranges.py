"""Range, zero point and log base of every activation, chosen by the error they cause in what reads it.

    x W:   min ||(x' - x) W||        q k^T:   min ||(q' - q) k^T||, then ||q' (k' - k)^T||        P v: likewise

x' is x quantized. A search by the error of the tensor itself spends codes on what the next product ignores. Both ends of a
range are free, and searched coarse to fine (`search`). All tensors are sampled in one sweep of the float graph, so the cost
does not grow with the square of the depth. Weights are not searched here.

``objective=tensor`` takes the error of the tensor itself; ``centered`` leaves the mean error of each channel out of account,
for recipes that take it out of the bias afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.graph import value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, QuantParams, QuantSpec, fake_quantize
from vitq_compiler.quantizer import Point, quantizer_for
from vitq_compiler.sampling import Samples, sample_matrices, sample_rows
from vitq_compiler.search import search

Loss = Callable[[NDArray[Any]], float]  # of a quantized tensor


@dataclass(frozen=True)
class SearchRanges(Pass):
    """QuantParams -> QuantParams of least error in the product that reads each activation"""

    name = "search-ranges"
    requires = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    edits = False
    objective: str = "output"
    centered: bool = False
    rows: int = 384
    images: int = 4

    def __post_init__(self) -> None:
        if self.objective not in ("output", "tensor"):
            raise ValueError(f"objective must be output or tensor, got {self.objective}")
        if self.rows < 1 or self.images < 1:
            raise ValueError("rows and images must be at least 1")

    def run(self, c: Compilation) -> int:
        return self._linears(c) + self._attention(c)

    def _linears(self, c: Compilation) -> int:
        """All Linear layers; those that read one tensor alike are searched together."""
        groups: dict[tuple[str, QuantSpec], list[Edge]] = {}
        nodes = {linear.name: linear for linear in c.annotations.linears}
        for name, linear in nodes.items():
            if (edge := Edge(name, 0)) in c.params and linear.input.name in c.table.statistics:
                groups.setdefault((linear.input.name, c.specs[edge]), []).append(edge)
        tensors = list(dict.fromkeys(name for name, _ in groups))
        if not tensors:
            return 0
        data = c.data
        samples = sample_rows(
            c.graph, tensors, data.calibration(), data.calibration_count, rows=self.rows, threads=c.threads, progress=c.progress
        )
        for done, ((name, spec), edges) in enumerate(groups.items()):
            c.progress("searching", done, len(groups))
            weight = np.concatenate([value(nodes[e.node].weight) for e in edges], axis=1)
            found = self._search(c, edges[0], samples[name], spec, self._after_linear(samples[name], weight))
            c.params.update(dict.fromkeys(edges, found))
        return sum(map(len, groups.values()))

    def _attention(self, c: Compilation) -> int:
        """Operands of attention products, the second of each given the first."""
        products = []
        for attention in c.annotations.attentions:
            edges = attention.edges
            products += [(edges[a], edges[b]) for a, b in (("q", "k"), ("probs", "v")) if edges and {edges[a], edges[b]} & c.params.keys()]
        by_name = {node.name: node for node in c.graph.nodes}
        names = {edge: by_name[edge.node].inputs[edge.index].name for pair in products for edge in pair}
        if not names:
            return 0
        data, unique = c.data, list(dict.fromkeys(names.values()))
        samples = sample_matrices(
            c.graph, unique, data.calibration(), data.calibration_count, images=self.images, threads=c.threads, progress=c.progress
        )
        for done, (left, right) in enumerate(products):
            c.progress("searching", done, len(products))
            a, b = samples[names[left]], samples[names[right]]
            if left in c.params:
                c.params[left] = self._search(c, left, a, c.specs[left], self._after(a, _times(b)))
                a = fake_quantize(a, c.params[left])
            if right in c.params:
                c.params[right] = self._search(c, right, b, c.specs[right], self._after(b, partial(np.matmul, a)))
        return len(names.keys() & c.params.keys())

    def _search(self, c: Compilation, edge: Edge, x: Samples, spec: QuantSpec, loss: Loss) -> QuantParams:
        quantizer = quantizer_for(spec)
        node = c.graph.node(edge.node)
        seen = c.table.statistics[node.inputs[edge.index].name]
        low, high = float(seen.low.min()), float(seen.high.max())

        def loss_at(point: Point) -> float:
            return loss(fake_quantize(x, quantizer.place(point, low, high, spec)))

        best = search(loss_at, quantizer.box(low, high, spec), quantizer.start(low, high, spec))
        return quantizer.place(best, low, high, spec)

    def _after_linear(self, x: Samples, weight: NDArray[Any]) -> Loss:
        if self.objective == "tensor":
            return lambda quantized: float(np.square(quantized - x).sum())
        gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else None  # the smaller of two products

        def loss(quantized: NDArray[Any]) -> float:
            error = quantized - x
            if self.centered:
                error = error - error.mean(0)
            return float(np.square(error @ weight).sum() if gram is None else np.vdot(error @ gram, error))

        return loss

    def _after(self, x: Samples, product: Callable[[Samples], Samples]) -> Loss:
        """The squared error of ``product``, which is linear, when x is quantized."""
        if self.objective == "tensor":
            return lambda quantized: float(np.square(quantized - x).sum())
        return lambda quantized: float(np.square(product(quantized - x)).sum())


def _times(right: Samples) -> Callable[[Samples], Samples]:
    return lambda error: error @ right
